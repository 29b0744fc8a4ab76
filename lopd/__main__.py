"""`python -m lopd` is the command `lopd`."""

import sys

from lopd.tools.command import main

if __name__ == "__main__":
    sys.exit(main())
