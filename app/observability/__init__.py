"""Records of requests: metrics, log, traces."""
