"""The signed life of a model: the bundle format, and its way from the central library to a box.

This package knows nothing of patients. The appliance imports ``model_sync.bundle``, ``.messages`` and ``.errors`` alone.
"""
