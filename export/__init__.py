"""Turn a trained network into a bundle: trace, two rewrites, verification, publication.

The service imports ``export.bundle`` alone, which imports neither torch nor onnx.
"""
