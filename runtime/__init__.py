"""ONNX inference with NumPy and ONNX Runtime; neither torch nor onnx is imported."""
