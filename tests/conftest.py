"""One thread, so that sums are formed in the same order on every machine, and no network.

Also rendered clips and their reading, made once: reading 64 clips takes about a second.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_clips import Clips

from selfforcing_dfd.processes.ranks import forget_groups
from selfforcing_dfd.rng import generator
from selfforcing_dfd.tiny.codec import TinyCodec
from selfforcing_dfd.tiny.readout import read
from selfforcing_dfd.tiny.world import draw_factors, render

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
gc.disable()  # while tests are imported: they leave no garbage

CODEC_FILE = Path(__file__).parents[1] / "assets" / "tiny" / "codec.safetensors"


def pytest_collection_finish() -> None:
    """What has been imported stays, so the collector need not look at it during the tests."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    """A run in 16 bits makes a process group of one; every test begins without."""
    leave_group()
    yield
    leave_group()


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        forget_groups()


@pytest.fixture(scope="session")
def clips() -> Clips:
    """64 draws from the data law.

    All shapes, sizes, speeds and directions and at least five hues occur.
    """
    factors = draw_factors(64, generator(0, "test clips"))
    videos = render(factors)
    return Clips(factors, videos, read(videos))


@pytest.fixture(scope="session")
def codec() -> TinyCodec:
    return TinyCodec.load(CODEC_FILE)


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where diffusers copies the code of opened folders: here, not into the user's cache."""
    from diffusers.utils import dynamic_modules_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", place)
        yield
