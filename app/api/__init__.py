"""The HTTP interface: bodies in, typed requests to the service, answers and problems out."""
