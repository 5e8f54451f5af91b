"""The life of a model on the box: wanted, proven in a process of its own, on trial, good, taken back. Its face is ``appliance.models``."""
