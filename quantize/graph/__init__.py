"""ONNX graphs: read and check a float model, clean it up, add a class activation map."""
