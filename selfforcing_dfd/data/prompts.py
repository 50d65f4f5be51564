"""Prompts without clips: all that Self-Forcing's own training, and the teacher's trajectories, ask
of data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from selfforcing_dfd.data.pack import TextEncoder
from selfforcing_dfd.data.publish import Unfinished
from selfforcing_dfd.data.shards import TEXT
from selfforcing_dfd.data.sources.files import PackError
from selfforcing_dfd.data.writing import (
    Job,
    PackSummary,
    Record,
    Refusal,
    Refuse,
    negative_files,
    npy,
    trim,
    write_folder,
)

NO_CODEC = "none: prompts without clips"
BATCH = 16  # prompts that are encoded together


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, a prompt each, without blank ones. PackError if there are
    none.
    """
    if not path.is_file():
        raise PackError(f"{path}: no such file; want a text file with a prompt on each line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PackError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    prompts = [" ".join(line.split()) for line in lines]
    if not any(prompts):
        raise PackError(f"{path} holds no prompts; want one on each line")
    return [prompt for prompt in prompts if prompt]


def pack_prompts(
    source: Path,
    out: Path | str,
    text: TextEncoder,
    latent_shape: tuple[int, int, int, int],
    *,
    negative_prompt: str | None = None,
    shard_size: int = 4096,
    dtype: str = "float16",
    strict: bool = False,
    overwrite: bool = False,
    unfinished: Unfinished = "discard",
) -> PackSummary:
    """A shard folder of prompts, as `pack` writes it but for the clips; latent_shape: F, C, H, W of
    what shall be generated.

    It serves the stages `dmd` and `pairs`. UMT5's states take 8 kB a token. PackError as for
    `pack`.
    """
    prompts, text_shape = read_prompts(source), tuple(text.encode([""]).shape[1:])
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    negative = text.encode([negative_prompt])[0] if negative_prompt is not None else None
    files, about = negative_files(negative, negative_prompt or "", dtype)
    about |= {
        "source": {"num_prompts": len(prompts), "sha256": digest},
        "settings": {"dtype": dtype},
    }
    fingerprints = {"codec": NO_CODEC, "text": text.fingerprint}

    def records(first: int, refuse: Refuse) -> Iterator[Record]:
        numbers = iter(
            tqdm(
                range(first, len(prompts)),
                "encoding",
                len(prompts),
                initial=first,
                unit="prompt",
                disable=None,
            )
        )
        while group := list(islice(numbers, BATCH)):
            yield from encoded(text, prompts, group, None if strict else refuse, dtype)

    job = Job(
        source.name, len(prompts), latent_shape, text_shape, fingerprints, about, shard_size, files
    )
    return write_folder(out, job, records, overwrite, unfinished)


def encoded(
    text: TextEncoder, prompts: list[str], numbers: list[int], refuse: Refuse | None, dtype: str
) -> Iterator[Record]:
    """Records of a few prompts; one that the encoder refuses is left out, or, without `refuse`,
    ends it all: PackError.
    """
    try:
        states = list(text.encode([prompts[number] for number in numbers]))
    except ValueError as error:
        name = f"line {numbers[0] + 1}"
        if len(numbers) == 1 and refuse is None:
            raise PackError(f"{name}: {error}. Repair it, or go without --strict") from error
        if len(numbers) == 1 and refuse is not None:
            refuse(numbers[0], Refusal(name, str(error)))
            return
        for number in numbers:
            yield from encoded(text, prompts, [number], refuse, dtype)
        return
    for number, tokens in zip(numbers, states, strict=True):
        key, about = (
            f"prompt{number:07d}",
            {"caption": prompts[number], "source": f"line {number + 1}"},
        )
        members = {
            TEXT: npy(trim(tokens), dtype, key),
            "json": json.dumps(about, ensure_ascii=False).encode(),
        }
        yield Record(number, key, prompts[number], members)
