"""`python -m dsfp4` is the `dsfp4` command."""

import sys

from dsfp4.cli import main

if __name__ == "__main__":
    sys.exit(main())
