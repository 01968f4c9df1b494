"""`python -m tanzaku` is the command `tanzaku`."""

import sys

from tanzaku.cli import main

if __name__ == "__main__":
    sys.exit(main())
