"""``python -m webui --data-dir DIR``."""

import sys

from webui.server import main

if __name__ == "__main__":
    sys.exit(main())
