"""The signed life of a model: the bundle format, and its way from the central library to a box.

This package knows nothing of patients. Only ``model_sync.bundle`` may be imported by the appliance.
"""
