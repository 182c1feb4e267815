"""ONNX graphs of the operators and of trained models, written from the specification as local functions."""
