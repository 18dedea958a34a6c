"""The service on a Ray cluster."""
