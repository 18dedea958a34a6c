"""Deployments of the service: images, Kubernetes, KServe, monitoring, Ray."""
