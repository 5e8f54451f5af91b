"""The box: scans in, findings out, offline."""

__version__ = "0.1.0"
