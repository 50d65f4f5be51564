"""The README.md of an exported student: what it is, how to run it, its training, its limits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfforcing_dfd.codecs.wan_vae import FPS, TIME
from selfforcing_dfd.models.identity import SELF_FORCING, Recipe

GENERATED = (
    "<!-- Written by selfforcing_dfd; edit it freely, or delete this line to keep exports from "
    "replacing it. -->"
)
SHOWN = (
    *("run.stage", "run.seed", "run.student_updates", "rollout", "optim.student"),
    *("ema", "batch", "dfd.preset"),
)  # settings and sections of a training config
OF_STAGES = {
    "dmd": ("score", "gan.weight", "optim.fake"),
    "dfd": ("score", "dfd", "gan.weight", "optim.fake"),
    "dp_dmd": ("score", "anchor", "flow.shift", "gan.weight", "optim.fake"),
    "regression": ("regression", "flow.shift"),
    "init": ("init", "flow.shift"),
}
"""Sections that are shown besides for runs of these stages: the others do not use them."""
GUIDED = ("dmd", "dfd", "dp_dmd")
"""Stages whose teacher is guided. For a run without a stage it is assumed."""
AS_PUBLISHED = "as_published"  # note in a weights file: deviations that it was trained with
DEVIATES = "Trained as the public Self-Forcing code does it where that differs from its papers:"
LIMITS = (
    "Made by distillation: it has the teacher's biases and weaknesses (hands, text, counting, "
    "physics) and somewhat less variety than the teacher has.",
    "No guidance scale and no negative prompt: {guidance}.",
    "Beyond the {frames} video frames of its training clips it continues its own output; colours "
    "and contrast may drift in minutes-long streams.",
    "It has no filter for prompts or pictures. Its videos are generated; they are no record of "
    "real events.",
)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a card says; nothing is claimed that is not given here.

    size: height and width of the training clips, None if not known. training: the settings of the
    run. published: what was trained as the public code does it, against its papers; empty for
    nothing. measured: results for this model, name -> value with unit. base_model: on the Hub;
    empty for a model that comes from none. usage: how to run it, in place of the usual words.
    """

    name: str
    recipe: Recipe = SELF_FORCING
    base_model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    license: str = "apache-2.0"
    num_parameters: int = 0
    size: tuple[int, int] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""
    measured: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    usage: str = ""

    @property
    def num_video_frames(self) -> int:
        return 1 + TIME * (self.recipe.frames - 1)


def write_model_card(folder: Path | str, facts: ModelFacts) -> Path:
    """Write README.md into an export's folder, unless somebody else wrote one; its path."""
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
        sections += ["## Training", "The settings of the run:", _training(facts.training)]
    if facts.published:
        sections.append(f"{DEVIATES} {facts.published}.")
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
    lines = [f"license: {json.dumps(facts.license)}"]  # JSON strings are YAML strings
    if facts.base_model:
        lines += [f"base_model: {json.dumps(facts.base_model)}", "base_model_relation: finetune"]
    lines += ["pipeline_tag: text-to-video", "library_name: diffusers", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)]
    return "\n".join(["---", *lines, "---"])


def _summary(facts: ModelFacts) -> str:
    origin = ""
    if facts.base_model:
        origin = f" of [{facts.base_model}](https://huggingface.co/{facts.base_model})"
    count = f"{parameter_count(facts.num_parameters)}, " if facts.num_parameters else ""
    size = ""
    if facts.size:
        height, width = facts.size
        size = f" Trained for {width} x {height} pixels, {FPS} video frames a second."
    return (
        f"A causal few-step student{origin}: {count}video in chunks of "
        f"{facts.recipe.chunk_frames} latent frames, {len(facts.recipe.ladder)} network calls "
        f"each, without end.{size}"
    )


def parameter_count(number: int) -> str:
    """A number of parameters in words: 1.42 billion, 1.6 million, or below a million exactly."""
    if number >= 10**9:
        return f"{number / 1e9:.2f} billion parameters"
    if number >= 10**6:
        return f"{number / 1e6:.1f} million parameters"
    return f"{number:,} parameters"


USE_WITH_A_PICTURE = f"""```python
import numpy as np
import torch
from diffusers.utils import load_image
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline

pipe = CausalWanPipeline.from_pretrained("FOLDER", dtype=torch.bfloat16).to("cuda")
picture = load_image("first.png").resize((832, 480))  # width and height of the video
context = torch.from_numpy(np.array(picture))[None] / 255  # [1, H, W, 3] in [0, 1]
for chunk in pipe.stream("a red fox walks through fresh snow", context=context):  # without end
    show(chunk.frames)  # uint8 [T, H, W, 3], {FPS} a second; the picture is the first one
```

From the command line:

    python inference/stream.py --model FOLDER --image first.png --prompt "a red fox walks"
"""


PLAIN_USAGE = """With {needed}, clips of up to the training length:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "FOLDER", custom_pipeline="{name}", trust_remote_code=True
)
clip = pipe("{prompt}").frames[0]
```

`trust_remote_code` runs `{name}.py` of this folder; it is short, read it."""
TINY_USAGE = PLAIN_USAGE.format(
    needed="diffusers, and selfforcing_dfd for words and codec",
    name="tiny_pipeline",
    prompt="a disc moves",
)


def _usage(facts: ModelFacts) -> str:
    if facts.usage:
        return facts.usage
    if facts.recipe.given:
        return USE_WITH_A_PICTURE.rstrip()
    return f"""```python
import torch
from diffusers.utils import export_to_video
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline

pipe = CausalWanPipeline.from_pretrained("FOLDER", dtype=torch.bfloat16).to("cuda")
clip = pipe("a red fox walks through fresh snow", seed=0).frames[0]
export_to_video(clip, "fox.mp4", fps={FPS})

stream = pipe.stream("a red fox walks through fresh snow")  # without end
for chunk in stream:
    show(chunk.frames)  # uint8 [T, H, W, 3]
    if chunk.chunk_index == 10:
        stream.session.set_prompt("the fox begins to run")
```

From the command line:

    python inference/stream.py --model FOLDER --prompt "a red fox walks through fresh snow"

{PLAIN_USAGE.format(needed="diffusers alone", name="pipeline", prompt="a red fox walks")}

`WanPipeline` cannot run it: the transformer is causal. The parts are plain: diffusers reads
`transformer` as `WanTransformer3DModel` and `vae` as `AutoencoderKLWan`."""


def _settings(facts: ModelFacts) -> str:
    recipe = facts.recipe
    chunk = recipe.chunk_frames
    rows = {
        "ladder before the shift": _numbers(recipe.ladder),
        "shift": f"{recipe.shift:g}",
        "sigmas": _numbers(recipe.sigmas),
        "noise between steps": recipe.noise,
        "chunk": f"{chunk} latent frames ({TIME * chunk} video frames)",
        "training clips": f"{recipe.frames} latent frames ({facts.num_video_frames} video frames)",
    }
    if recipe.window:
        rows["window"] = f"{recipe.window} latent frames of history and current chunk"
        rows["sink"] = f"{recipe.sink} latent frames"
    if recipe.given:
        rows["given"] = f"the first {recipe.given} latent frame(s), such as a picture's"
    if recipe.first_ladder:
        rows["first chunk's ladder before the shift"] = _numbers(recipe.first_ladder)
    if not recipe.commits:
        rows["context"] = "keys and values of the last denoising step; no commit pass"
    return _table(("setting", "value"), rows)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _training(settings: Mapping[str, Any]) -> str:
    shown = (*SHOWN, *OF_STAGES.get(_stage_of(settings), ()))
    rows = {name: f"`{value}`" for name, value in _flat(settings) if _is_in(name, shown)}
    return _table(("setting", "value"), rows)


def _measured(facts: ModelFacts) -> str:
    return _table(("what", "value"), facts.measured) if facts.measured else "Nothing yet."


def _limits(facts: ModelFacts) -> str:
    guidance = "guidance was distilled into the weights"
    if _stage_of(facts.training) not in ("", *GUIDED):
        guidance = "it was trained without guidance"
    known = {"frames": facts.num_video_frames, "guidance": guidance}
    limits = [limit.format(**known) for limit in LIMITS] + list(facts.limits)
    return "\n".join(f"- {limit}" for limit in limits)


def _stage_of(settings: Mapping[str, Any]) -> str:
    """The stage of a run; empty for settings without one."""
    return str(settings.get("run", {}).get("stage", ""))


def _is_in(name: str, sections: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{section}.") for section in sections)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names with their values."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    for name, value in rows.items():
        escaped = str(value).replace("|", r"\|")
        lines.append(f"| {name} | {escaped} |")
    return "\n".join(lines)
