"""How the service is run by others: images, compose, Kubernetes, Ray."""
