"""The commands: serve, score, key."""
