"""Turn a trained network into a bundle: trace, two rewrites, verification, publication.

Only ``export.bundle`` is for the service; it imports neither torch nor onnx. The letters of array
shapes are those of the package ``model``.
"""
