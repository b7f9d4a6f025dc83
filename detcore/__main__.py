"""``python -m detcore`` is the command ``detcore``."""

import sys

from detcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
