"""``python -m webui --data-dir DIR``."""

import sys

from webui import create_app
from webui.server.process import main

if __name__ == "__main__":
    sys.exit(main(create_app))
