"""The models of refimpl as ONNX graphs: one file each, written with export.ops from the Config of their namesake."""
