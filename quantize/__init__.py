"""From a float model and representative scans to a gated bundle; the reference model is made in ``reference``."""

import quantize.messages  # noqa: F401  (registers the codes of this package)
