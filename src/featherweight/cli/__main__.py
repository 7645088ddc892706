"""``python -m featherweight.cli`` is the program too."""

import sys

from featherweight.cli import main

if __name__ == "__main__":
    sys.exit(main())
