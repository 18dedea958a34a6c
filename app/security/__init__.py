"""Access to the service: API keys, and loopback addresses."""
