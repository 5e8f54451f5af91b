"""The command ``model-library`` before it compared gate records and ran golden cases, as ``python -m tests.support.older_library``."""

from __future__ import annotations

import sys

from model_sync.fleet import cli
from tests.support.library_site import older_publish

if __name__ == "__main__":
    with older_publish():
        sys.exit(cli.main())
