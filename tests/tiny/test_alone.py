"""The tiny world is a world, not a program: it depends on no part that uses it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from selfforcing_dfd.tiny import bootstrap, codec, metrics, readout, text, world
users = ("data", "training", "evaluation", "stages", "streaming", "cli", "config")
print(*[name for name in sys.modules if name.split(".")[1:2] and name.split(".")[1] in users
        and name.startswith("selfforcing_dfd.")])
"""


def test_tiny_world_imports_nothing_that_uses_it():
    """Catches a read-out that needs the packer, or metrics that need a run's config."""
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
