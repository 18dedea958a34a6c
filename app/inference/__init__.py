"""Requests into answers, whatever the transport: queue, shared batches, onnxruntime."""
