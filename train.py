"""Distil a few-step autoregressive video generator: `python train.py --config dfd_ar.yaml`.

The same as the console command `selfforcing-dfd train`; --help lists the options.
"""

from __future__ import annotations

import sys

from selfforcing_dfd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
