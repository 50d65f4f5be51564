"""Calls VBench on the videos of this folder. Run it with VBench's own Python, in this folder.

It needs vbench 0.1.5 and a GPU (docs/vbench/Dockerfile), and nothing of selfforcing_dfd. In the
package it is a template; nothing imports it.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

OF_PICTURES = ("i2v_subject", "i2v_background")


def main() -> None:
    torch = import_module("torch")
    vbench = import_module("vbench")
    here = Path.cwd()
    layout = json.loads((here / "layout.json").read_text(encoding="utf-8"))
    device = torch.device("cuda")
    info = Path(str(vbench.__file__)).with_name("VBench_full_info.json")
    results = here / "results"
    of_videos = [name for name in layout["dimensions"] if name not in OF_PICTURES]
    of_pictures = [name for name in layout["dimensions"] if name in OF_PICTURES]
    # absolute names, as the tool compares them
    prompts = {
        str(here / "videos" / f"{number:06d}.mp4"): entry["prompt"]
        for number, entry in enumerate(layout["videos"])
    }
    common: dict[str, Any] = {
        "videos_path": str(here / "videos"),
        "mode": "custom_input",
        "local": "VBENCH_CACHE_DIR" in os.environ,
        "imaging_quality_preprocessing_mode": "longer",
    }
    if of_videos:
        tool = vbench.VBench(device, str(info), str(results))
        tool.evaluate(name="videos", prompt_list=prompts, dimension_list=of_videos, **common)
    if of_pictures:
        tool = import_module("vbench2_beta_i2v").VBenchI2V(device, str(info), str(results))
        images = str(here / "images")
        tool.evaluate(
            name="pictures",
            dimension_list=of_pictures,
            custom_image_folder=images,
            resolution=None,
            **common,
        )


if __name__ == "__main__":
    main()
