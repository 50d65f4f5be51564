"""What makes a saved pipeline one that diffusers loads and runs without this package's classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers

from selfforcing_dfd.models.identity import Recipe

INDEX_FILE = "model_index.json"
PIPELINE_FILE = "pipeline.py"
TINY_PIPELINE_FILE = "tiny_pipeline.py"
"""Another name: diffusers keeps one module of each name in a process."""
TRANSFORMER = ["diffusers", "WanTransformer3DModel"]
CODEC_MODULE = "tiny_codec"
HERE = Path(__file__).parent


def open_to_diffusers(folder: Path, recipe: Recipe) -> None:
    """Name the transformer as diffusers' own class, which reads it, and add `pipeline.py`.

    A student that begins with given frames gets no `pipeline.py`, which cannot give them.
    """
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    write_index(folder, {**index, "transformer": TRANSFORMER})
    if not recipe.given:
        shutil.copyfile(HERE / "for_diffusers.py", folder / PIPELINE_FILE)


def open_tiny_to_diffusers(folder: Path) -> None:
    """The same for a student of the tiny world, whose transformer and codec are saved already."""
    index = {
        "_class_name": "TinyStudentPipeline",
        "_diffusers_version": diffusers.__version__,
        "codec": [CODEC_MODULE, "TinyWorldCodec"],
        "transformer": TRANSFORMER,
    }
    write_index(folder, index)
    shutil.copyfile(HERE / "tiny_for_diffusers.py", folder / TINY_PIPELINE_FILE)
    module = folder / "codec" / f"{CODEC_MODULE}.py"
    shutil.copyfile(HERE / "tiny_codec_for_diffusers.py", module)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    text = json.dumps(index, indent=2) + "\n"
    (folder / INDEX_FILE).write_text(text, encoding="utf-8")
