"""``python -m model_sync``: the command ``model-sync``."""

import sys

from model_sync.agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
