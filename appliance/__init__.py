"""The box: scans in, findings out, offline."""

import appliance.messages  # noqa: F401  (registers the box's codes: whoever raises one can say it)

__version__ = "0.1.0"
