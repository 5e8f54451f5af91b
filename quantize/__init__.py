"""From a float model and representative scans to a gated bundle; the reference model is made in ``reference``."""
