"""Processes of the service: a single worker, or several with a supervisor."""
