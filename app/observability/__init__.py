"""What is recorded of requests: metrics, log, traces."""
