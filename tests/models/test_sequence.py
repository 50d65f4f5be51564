"""A sequence on several processes gives what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one(tmp_path: Path, size: int):
    """Catches tokens in another order, heads of another process, and gradients counted twice.

    What is compared, in float64: whole clips and their gradients, rollouts and their replay,
    streams past the window with a prompt change, and what is refused.
    """
    script = HERE / "several_processes.py"
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[1])])
    found = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(size)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
