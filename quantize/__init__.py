"""Make a gated model bundle from a float ONNX model and sets of images; ``reference`` makes the reference model."""

import quantize.messages  # noqa: F401  (registers the codes of this package)
