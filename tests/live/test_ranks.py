"""A stream of several processes: torchrun, the command line and a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forked import End, run_script

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.ranks import refuse_ranks

ROOT = Path(__file__).parents[2]
STREAM = ["inference/stream.py", "--chunks", "4", "--device", "cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def in_two(folder: Path, *arguments: str) -> End:
    """How `torchrun` of two processes ends."""
    found = subprocess.run(
        [sys.executable, *TORCHRUN, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input="",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return End(found.returncode, found.stdout, found.stderr)


def test_two_processes_write_the_stream_of_one(tmp_path: Path):
    """Catches a second file, a prompt that one process alone obeys, and heads that are mixed up.

    In float32 the sums of the two have another order: a pixel may differ by a level or two where
    it stands near the border of two, and no more.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("0: a disc moves\n2: a cross moves\n")
    videos = []
    for name, start in (("two", in_two), ("one", run_script)):
        folder = tmp_path / name
        folder.mkdir()
        out = folder / "video.y4m"
        end = start(tmp_path, *STREAM, "--prompts", str(prompts), "--out", str(out))
        assert end.code == 0, end.errors
        assert end.errors.count(f"wrote {out}") == 1
        videos.append(np.frombuffer(out.read_bytes(), np.uint8).astype(int))
        assert list(folder.iterdir()) == [out]
    difference = np.abs(videos[0] - videos[1])
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.01
    assert videos[0].std() > 10  # there is something to see


def test_the_page_is_not_served_by_several_processes(monkeypatch: pytest.MonkeyPatch):
    """Catches two servers that fight for one port."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the web page runs in one process, but WORLD_SIZE is 2"):
        refuse_ranks("the web page")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_ranks("the web page")
