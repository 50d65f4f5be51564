"""The README.md of an exported student: what it is, how to run it, how it was trained, what it
cannot do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.models.hub import Recipe

GENERATED = "<!-- Written by selfforcing_dfd; edit it freely, or delete this line to keep exports from replacing it. -->"
SHOWN = (
    "run",
    "rollout",
    "score",
    "dfd",
    "optim.student",
    "optim.fake",
    "ema",
    "batch",
)  # sections of a training config
LIMITS = (
    "Made by distillation: it has the teacher's biases and weaknesses (hands, text, counting, physics) and somewhat less "
    "variety than the teacher has.",
    "No guidance scale and no negative prompt: guidance was distilled into the weights.",
    "Beyond the {frames} video frames of its training clips it goes on from what it has made itself; colours and contrast "
    "may drift in minutes-long streams.",
    "It has no filter for prompts or pictures. What it shows has never happened.",
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a card is made of. size: height and width of the training clips; training: a resolved
    training config.

    measured: what was found out about this model, name -> value with unit. Nothing is claimed that
    is not given here.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    base_model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    license: str = "apache-2.0"
    num_parameters: int = 0
    size: tuple[int, int] = (480, 832)
    training: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def num_video_frames(self) -> int:
        return 1 + 4 * (self.recipe.num_frames - 1)


def write_model_card(folder: Path | str, facts: ModelFacts) -> Path:
    """README.md in an export's folder; where it is. A README that somebody else wrote stays as it
    is.
    """
    path = Path(folder) / "README.md"
    if not path.exists() or GENERATED in path.read_text():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(model_card(facts))
    return path


def model_card(facts: ModelFacts) -> str:
    """The card's text."""
    sections = [
        f"# {facts.name}",
        _summary(facts),
        "## Use",
        _usage(facts),
        "## Settings",
        _settings(facts),
    ]
    if facts.training:
        sections += [
            "## Training",
            "What differs between trainings, as it was resolved:",
            _training(facts.training),
        ]
    sections += ["## Measured", _measured(facts), "## Limits", _limits(facts)]
    return "\n\n".join([_front_matter(facts), GENERATED, *sections]) + "\n"


def _front_matter(facts: ModelFacts) -> str:
    tags = (
        "text-to-video",
        "autoregressive",
        "streaming",
        "self-forcing",
        "distillation",
        *facts.tags,
    )
    lines = [
        f"license: {json.dumps(facts.license)}",  # JSON strings are YAML strings
        f"base_model: {json.dumps(facts.base_model)}",
        "base_model_relation: finetune",
        "pipeline_tag: text-to-video",
        "library_name: diffusers",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)),
    ]
    return "\n".join(["---", *lines, "---"])


def _summary(facts: ModelFacts) -> str:
    height, width = facts.size
    many = f"{facts.num_parameters / 1e9:.2f} billion parameters, " if facts.num_parameters else ""
    return (
        f"A causal few-step student of [{facts.base_model}](https://huggingface.co/{facts.base_model}): {many}video in "
        f"chunks of {facts.recipe.chunk_frames} latent frames, {len(facts.recipe.timesteps)} network calls each, without "
        f"end. Trained for {width} x {height} pixels, 16 video frames a second."
    )


def _usage(facts: ModelFacts) -> str:
    height, width = facts.size
    return f"""```python
import torch
from diffusers.utils import export_to_video
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline

pipe = CausalWanPipeline.from_pretrained("FOLDER", dtype=torch.bfloat16).to("cuda")
clip = pipe("a red fox walks through fresh snow", height={height}, width={width}, seed=0).frames[0]
export_to_video(clip, "fox.mp4", fps=16)

stream = pipe.stream("a red fox walks through fresh snow")  # without end
for chunk in stream:
    show(chunk.frames)  # uint8 [T, H, W, 3]
    if chunk.chunk_index == 10:
        stream.session.set_prompt("the fox begins to run")
```

From the command line: `python inference/stream.py --model FOLDER --prompt "a red fox walks through fresh snow"`.

`WanPipeline` and `DiffusionPipeline` cannot run it: the transformer is causal. The parts are plain: diffusers reads
`transformer` as `WanTransformer3DModel` and `vae` as `AutoencoderKLWan`."""


def _settings(facts: ModelFacts) -> str:
    recipe = facts.recipe
    rows = {
        "ladder before the shift": ", ".join(f"{timestep:g}" for timestep in recipe.timesteps),
        "shift": f"{recipe.shift:g}",
        "sigmas": ", ".join(f"{sigma:.4g}" for sigma in recipe.ladder),
        "chunk": f"{recipe.chunk_frames} latent frames ({4 * recipe.chunk_frames} video frames)",
        "training clips": f"{recipe.num_frames} latent frames ({facts.num_video_frames} video frames)",
    }
    return _table(("setting", "value"), rows)


def _training(config: Mapping[str, Any]) -> str:
    return _table(
        ("setting", "value"), {key: f"`{value}`" for key, value in _flat(config) if _is_shown(key)}
    )


def _measured(facts: ModelFacts) -> str:
    return _table(("what", "value"), facts.measured) if facts.measured else "Nothing yet."


def _limits(facts: ModelFacts) -> str:
    limits = [limit.format(frames=facts.num_video_frames) for limit in LIMITS] + list(facts.limits)
    return "\n".join(f"- {limit}" for limit in limits)


def _is_shown(key: str) -> bool:
    return any(
        key == section or key.startswith(f"{section}.") for section in SHOWN
    ) and not key.startswith("run.out")


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names with their values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        pairs += (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else [(f"{prefix}{key}", value)]
        )
    return pairs


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    cells = [head, ("---", "---"), *rows.items()]
    return "\n".join(
        f"| {left} | {str(right).replace('|', chr(92) + '|')} |" for left, right in cells
    )
