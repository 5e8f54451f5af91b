"""Pixels: decoding, grey scale, preprocessing before and postprocessing after a model."""
