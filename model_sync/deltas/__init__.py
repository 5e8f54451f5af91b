"""The format and the making of deltas between model files; its face is ``model_sync.delta``."""
