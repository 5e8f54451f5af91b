"""The agent as a process of its own: ``python -m tests.agent_process CONFIG [--now]``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from model_sync.agent.service import run
from model_sync.settings import SyncSettings

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print("started", flush=True)
    sys.exit(run(SyncSettings.load(Path(sys.argv[1])), at_once="--now" in sys.argv))
