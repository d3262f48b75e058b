"""What needs a built model besides its weights: ONNX graphs, and outputs compared with other implementations."""
