"""`python -m swiftlite` is the same as `swiftlite`."""

import sys

from swiftlite.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
