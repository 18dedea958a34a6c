"""Who may use the service: API keys, and what counts as local."""
