"""Measure videos: `python inference/evaluate.py VIDEO ...`. Colour, flicker, motion, camera, drift.

The same as the console command `selfforcing-dfd evaluate`; --help lists the options.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

from selfforcing_dfd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
