"""`python -m lopd` is the command `lopd`."""

import sys

from lopd.tools.command import process

if __name__ == "__main__":
    sys.exit(process())
