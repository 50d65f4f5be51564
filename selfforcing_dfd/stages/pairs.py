"""Stage `pairs`: noise, and the clip that the teacher's ODE makes of it, for each caption.

Each process makes batches of its own, and the first one writes them in order. So the files are the
same for any number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from selfforcing_dfd import rng
from selfforcing_dfd.config import Config, ranged, require
from selfforcing_dfd.context import Conditioning
from selfforcing_dfd.data.format import (
    LATENT,
    NEGATIVE_NAME,
    NOISE,
    PICTURE,
    PICTURE_TOKENS,
    TEXT,
    npy,
)
from selfforcing_dfd.data.order import picture_of
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.write import Job, PackSummary, Record, Refuse, Unfinished, write_folder
from selfforcing_dfd.models.picture import conditioning_of
from selfforcing_dfd.ode import sample
from selfforcing_dfd.processes.shared_work import Share, work_together
from selfforcing_dfd.stages.base import (
    FlowConfig,
    Pass,
    ShardStage,
    Start,
    register,
    require_teacher,
    teacher_start,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairsConfig:
    """Noise and clip for each caption of data.shards, as shards of their own."""

    out: str = ""  # folder
    num: int = ranged(0, 0, 1_000_000_000)  # captions, from the first one; 0 takes all
    steps: int = ranged(24, 1, 10_000)  # of Heun's method, 2 steps - 1 calls
    guidance: float = ranged(6.0, 0, 1000)


@register
class PairsStage(ShardStage):
    """Pair n starts from noise that depends on the seed and n alone."""

    name = "pairs"
    sections = {"pairs": PairsConfig, "flow": FlowConfig}
    needs_clips = False
    takes_given = False
    pairs_per_shard: ClassVar[int] = 256

    @classmethod
    def check(cls, config: Config) -> None:
        require_teacher(config)
        require(
            bool(config.of(PairsConfig).out),
            "run.stage is pairs but pairs.out is empty: name the folder for the pairs",
        )

    @classmethod
    def starts(cls, config: Config) -> dict[str, Start]:
        return {"teacher": teacher_start(config)}

    @classmethod
    def passes(cls, config: Config) -> dict[str, list[Pass]]:
        pairs = config.of(PairsConfig)
        guided = 1 if pairs.guidance == 1 else 2
        calls = (2 * pairs.steps - 1) * guided
        return {"pair": [Pass("teacher's ODE", "teacher", "clip", calls, rows=guided)]}

    @classmethod
    def updates(cls, config: Config) -> dict[str, int]:
        return {}

    @classmethod
    def num_items(cls, config: Config, num_samples: int) -> int:
        return config.of(PairsConfig).num or num_samples

    @classmethod
    def describe(cls, config: Config) -> Iterator[tuple[str, str]]:
        pairs = config.of(PairsConfig)
        count = f"the first {pairs.num}" if pairs.num else "all"
        text = f"of {count} captions, {pairs.steps} steps guided by {pairs.guidance:g}"
        yield "pairs", f"{text}, into {pairs.out}"

    @classmethod
    def make_shards(
        cls,
        config: Config,
        networks: Mapping[str, nn.Module],
        fingerprints: Mapping[str, str],
        reader: ShardReader,
        resume: bool,
    ) -> str:
        pairs = config.of(PairsConfig)
        flow = config.of(FlowConfig)
        solver = f"{fingerprints['teacher']}-{pairs.steps}-{pairs.guidance:g}-{flow.shift:g}"
        negative = {}
        files: dict[str, bytes] = {}
        stored = reader.place.content(NEGATIVE_NAME)
        if reader.negative is not None and stored is not None:
            negative = {"negative": reader.index.about["negative"]}
            files = {NEGATIVE_NAME: stored}
        job = Job(
            name=pairs.out,
            num_items=min(pairs.num or len(reader), len(reader)),
            latent_shape=reader.index.latent_shape,
            text_shape=reader.index.text_shape,
            fingerprints={**reader.index.fingerprints, "noise": f"{solver}-{config.run.seed}"},
            about={
                "source": {"shards": config.data.shards, "sha256": reader.index_hash},
                **negative,
            },
            shard_size=cls.pairs_per_shard,
            files=files,
        )

        unfinished: Unfinished = "resume" if resume else "keep"

        def make(numbers: range) -> list[Record]:
            return list(make_pairs(config, networks["teacher"], reader, numbers))

        def write(share: Share[range, list[Record]]) -> PackSummary:
            records = partial(in_batches, share, job.num_items, config.batch.micro)
            return write_folder(pairs.out, job, records, unfinished=unfinished)

        summary = work_together(make, write, config.model.sequence_ranks)
        return f"{summary.folder}: {summary.num_samples} pairs in {summary.num_shards} shards"


def in_batches(
    share: Share[range, list[Record]], num_items: int, size: int, first: int, refuse: Refuse
) -> Iterator[Record]:
    """All pairs from `first` on, `size` at a time: a batch is made by one process."""
    starts = range(first, num_items, size)
    batches = [range(start, min(start + size, num_items)) for start in starts]
    for batch in tqdm(share(batches), "pairs", len(batches), unit="batch", disable=None):
        yield from batch


def make_pairs(
    config: Config, teacher: nn.Module, reader: ShardReader, numbers: range
) -> Iterator[Record]:
    """One batch of pairs."""
    pairs = config.of(PairsConfig)
    samples = [reader[number] for number in numbers]
    device = next(teacher.parameters()).device
    noise = draw_noise(config.run.seed, reader.index.latent_shape, numbers).to(device)
    text = torch.stack([sample.text for sample in samples]).to(device)
    negative = None
    if reader.negative is not None:
        negative = Conditioning(reader.negative.to(text).expand_as(text))
    shift = config.of(FlowConfig).shift
    shown = [each.picture for each in samples if each.picture is not None]
    conditioning = conditioning_of(text, picture_of(shown).to(device) if shown else None)
    clips = sample(teacher, noise, conditioning, pairs.steps, shift, pairs.guidance, negative)
    for number, of_caption, latents, start in zip(numbers, samples, clips, noise, strict=True):
        about = {
            "caption": of_caption.caption,
            "source": f"pair {number}",
            "steps": pairs.steps,
            "guidance": pairs.guidance,
        }
        members = {
            LATENT: npy(latents, "float16", f"pair {number}"),
            NOISE: npy(start, "float16", f"pair {number}"),
            TEXT: reader.text_bytes(number),
            "json": json.dumps(about, ensure_ascii=False).encode(),
        }
        stored = reader.members(number)
        members |= {name: stored[name] for name in (PICTURE, PICTURE_TOKENS) if name in stored}
        yield Record(number, of_caption.key, of_caption.caption, members)


def draw_noise(seed: int, shape: tuple[int, ...], numbers: range) -> Tensor:
    """[B, *shape]: noise that depends on the seed and each pair's number alone."""
    return torch.stack([rng.normal(shape, seed, "pairs", number) for number in numbers])
