"""`python -m selfforcing_dfd` is the console command `selfforcing-dfd`."""

import sys

from selfforcing_dfd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
