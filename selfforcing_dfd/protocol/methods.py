"""A protocol's methods: what is missing of them, and what their videos depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfforcing_dfd.codecs.prompts import NEGATIVE_PROMPT
from selfforcing_dfd.common import find_device, find_file
from selfforcing_dfd.models.identity import SELF_FORCING
from selfforcing_dfd.protocol.makers import (
    CausalTeacher,
    Make,
    Sampler,
    Student,
    Teacher,
    TinyData,
    chunks_of,
    tiny_parts,
    wan_parts,
)
from selfforcing_dfd.protocol.plan import (
    CAUSAL,
    SET,
    STUDENT,
    TEACHER,
    TINY_DATA,
    VIDEOS,
    Cell,
    MethodPlan,
    Protocol,
)
from selfforcing_dfd.streaming.load import load_settings, load_stream_model
from selfforcing_dfd.streaming.load_wan import load_wan_model
from selfforcing_dfd.streaming.model import StreamModel
from selfforcing_dfd.streaming.session import StreamSettings
from selfforcing_dfd.tiny.codec import TIME
from selfforcing_dfd.weights.read import describe


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a protocol for one set of prompts. Nothing is loaded before `make`."""

    name: str
    plan: MethodPlan
    protocol: Protocol
    set: str

    @property
    def weights(self) -> str:
        return self.plan.weights.replace(SET, self.set)

    @property
    def latent_frames(self) -> int:
        return self.plan.latent_frames or self.protocol.latent_frames

    @property
    def num_frames(self) -> int:
        """Video frames of one video."""
        return 1 + TIME * (self.latent_frames - 1)

    @property
    def size(self) -> tuple[int | None, int | None]:
        height, width = self.protocol.size or (None, None)
        return height, width

    def file(self, cell: Cell) -> Path:
        """A video that others made."""
        number = f"{cell.prompt.number:03d}"
        return Path(self.plan.files.format(number=number, seed=cell.seed, set=cell.prompt.set))

    def missing(self, cells: list[Cell]) -> str:
        """What is not there, in words; empty if the method can be run."""
        if self.plan.kind == VIDEOS:
            lacking = [self.file(cell) for cell in cells if not self.file(cell).is_file()]
            if lacking:
                return f"{len(lacking)} of {len(cells)} videos are not there, such as {lacking[0]}"
        pictures = {cell.prompt.image for cell in cells if cell.prompt.image}
        absent = sorted(name for name in pictures if not find_file(name).is_file())
        if absent:
            return f"{len(absent)} of {len(pictures)} pictures are not there, such as {absent[0]}"
        if self.plan.weights and not find_file(self.weights).exists():
            return f"no weights at {self.weights}"
        if self.plan.model and not find_file(self.plan.model).exists():
            return f"no folder {self.plan.model}"
        return ""

    def described(self) -> dict[str, Any]:
        """What a video depends on beside prompt and seed; two of another description differ."""
        if self.plan.kind == VIDEOS:
            return {"kind": VIDEOS, "files": self.plan.files}
        about: dict[str, Any] = {"kind": self.plan.kind, "latent_frames": self.latent_frames}
        about |= {"fps": self.protocol.fps, "size": list(self.protocol.size)}
        if self.plan.kind == STUDENT:
            return about | self._described_student()
        if self.plan.kind in (TEACHER, CAUSAL):
            about["sampler"] = {"ode": "Heun", **asdict(self.sampler())}
            about["chunk_frames"] = self.protocol.chunk_frames
        if self.plan.kind == CAUSAL:
            about["window"] = self.window()
        return about

    def _described_student(self) -> dict[str, Any]:
        recipe = describe(find_file(self.weights)).recipe
        settings = asdict(self.settings())
        del settings["seed"]
        found = asdict(recipe or SELF_FORCING)
        found["ladder"] = list(found["ladder"])
        if found["first_ladder"]:
            found["first_ladder"] = list(found["first_ladder"])
        if found["context"] == "clean":
            del found["context"]  # as it was before there was another
        return {"sampler": found, "recipe_stated": recipe is not None, "stream": settings}

    def settings(self) -> StreamSettings:
        """How its streams run; of a causal teacher, how far it looks back."""
        recipe = describe(find_file(self.weights)).recipe
        preset = "default" if self.plan.model else "tiny"
        found = load_settings(self.plan.settings, default=preset, recipe=recipe)
        if recipe is not None and recipe.chunk_frames == recipe.frames:
            # it makes a clip at once and has no past
            return replace(found, sink_frames=0, window_frames=recipe.chunk_frames)
        return found

    def sampler(self) -> Sampler:
        """Of a teacher. A causal one is not guided."""
        guidance = self.plan.guidance if self.plan.kind == TEACHER else 1.0
        negative = NEGATIVE_PROMPT if self.plan.model and guidance != 1 else ""
        return Sampler(self.plan.steps, self.plan.shift, guidance, negative)

    def window(self) -> int:
        """Latent frames that a causal teacher sees."""
        settings = self.settings()
        return settings.sink_frames + settings.window_frames

    def load(self, device: str) -> Make:
        """What makes its videos, with its network on a device."""
        if self.plan.kind == STUDENT:
            return Student(self._load_stream(device), self.settings(), self.num_frames)
        if self.plan.kind == TINY_DATA:
            return TinyData(self.num_frames)
        weights = find_file(self.weights)
        run_on = find_device(device)
        if self.plan.model:
            model = find_file(self.plan.model)
            parts = wan_parts(weights, model, self.size, run_on, self.latent_frames)
        else:
            parts = tiny_parts(weights, run_on)
        chunks = chunks_of(self.latent_frames, self.protocol.chunk_frames)
        if self.plan.kind == CAUSAL:
            return CausalTeacher(parts, self.sampler(), chunks, self.window())
        return Teacher(parts, self.sampler(), chunks)

    def _load_stream(self, device: str) -> StreamModel:
        if not self.plan.model:
            return load_stream_model(checkpoint=self.weights, device=device)
        model = find_file(self.plan.model)
        return load_wan_model(model, self.weights, device, size=self.size)
