"""Turn a trained network into a bundle: trace, two rewrites, verification, publication.

Only ``export.bundle`` is for the service; it imports neither torch nor onnx. The letters of array
shapes are those of the package ``model``.
"""

import os

# onnxruntime reports to its maker unless it is told not to before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
