"""The box: scans in, findings out, offline."""

import appliance.messages  # noqa: F401  (registers the codes of the box, so that every text can be found)

__version__ = "0.2.0"
