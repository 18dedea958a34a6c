"""Turn a trained network into a bundle: trace, rewrite into two graphs, verify, publish.

The service imports ``export.bundle`` alone, which imports neither torch nor onnx.
"""
