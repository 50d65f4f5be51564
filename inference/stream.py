"""Stream video without end: `python inference/stream.py --prompt "a disc moves"`.

The same as the console command `selfforcing-dfd stream`; --help lists the options. Real Wan2.1:

    hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir wan
    hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir wan
    python inference/stream.py --model wan --weights wan/checkpoints/self_forcing_dmd.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where nothing is installed

from selfforcing_dfd.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["stream", *sys.argv[1:]]))
