"""``model-library serve`` as a process of its own: the real arguments, the real server."""

from __future__ import annotations

import argparse
import sys

from model_sync.errors import ModelSyncError
from model_sync.fleet.server import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    try:
        sys.exit(run(parser.parse_args()))
    except ModelSyncError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
