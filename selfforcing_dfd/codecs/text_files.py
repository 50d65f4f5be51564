"""The files of Wan's text encoder: are they all there, and which encoder are they."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from selfforcing_dfd.codecs.prompts import MAX_LENGTH, TextError

SAMPLE_BYTES = 1024  # of each tensor, in a fingerprint
WORD_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # the encoder of 14B is the same


def fetch(folder: Path | str) -> str:
    """The command that downloads missing files."""
    return (
        f"fetch them: hf download {REPOSITORY} --include 'text_encoder/*' "
        f"--include 'tokenizer/*' --local-dir {folder}"
    )


def weight_files(path: Path) -> list[Path]:
    """Safetensors files of a model's folder, whether they exist or not."""
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = list(json.loads(index.read_text())["weight_map"].values())
    return [path / name for name in sorted(set(names))]


def folder_fingerprint(folder: Path | str, dtype: torch.dtype, max_length: int = MAX_LENGTH) -> str:
    """The fingerprint of `WanText.from_pretrained` of this folder, without reading its 11 GB.

    It takes about a second. It covers the encoder's config, the tokenizer's files, dtype and
    length, and every tensor's name, shape, type, file and first KiB; a change further inside a
    tensor does not show. Raises TextError for missing files.
    """
    encoder = Path(folder) / "text_encoder"
    tokenizer = Path(folder) / "tokenizer"
    config = encoder / "config.json"
    wanted = [config, *weight_files(encoder), tokenizer / "tokenizer.json"]
    missing = [str(path.relative_to(folder)) for path in wanted if not path.is_file()]
    if missing:
        raise TextError(f"{folder} lacks {', '.join(missing)}; {fetch(folder)}")
    kind = json.loads(config.read_text()).get("model_type")
    if kind != "umt5":
        raise TextError(
            f"{config} describes a {kind!r} model; Wan2.1 wants 'umt5'; {fetch(folder)}"
        )
    words = [tokenizer / name for name in WORD_FILES]
    parts = [path.read_bytes() for path in (config, *words) if path.is_file()]
    parts.append(f"{dtype} {max_length}".encode())
    for file in weight_files(encoder):
        parts += samples(file)
    return fingerprint_of(parts)


def fingerprint_of(parts: list[bytes]) -> str:
    """The fingerprint of these bytes; each part's length counts, so that no byte can move on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)) + part)
    return f"umt5-{digest.hexdigest()[:16]}"


def samples(path: Path) -> Iterator[bytes]:
    """A safetensors file's header, then the first bytes of each of its tensors.

    Raises TextError for a file that is cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = file.read(min(struct.unpack("<Q", file.read(8))[0], size))
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            spans = {name: about["data_offsets"] for name, about in entries.items()}
        except (struct.error, ValueError) as error:
            raise TextError(
                f"{path} is no safetensors file, perhaps a git-lfs pointer; fetch it again"
            ) from error
        start = file.tell()
        if size != start + max((last for _, last in spans.values()), default=0):
            raise TextError(
                f"{path} has {size} bytes, which is not what its header says: it was cut short; "
                "fetch it again"
            )
        yield header
        for _, (first, last) in sorted(spans.items()):
            file.seek(start + first)
            yield file.read(min(last - first, SAMPLE_BYTES))


def check_embedding(encoder: Any, path: Path) -> None:
    """Raise TextError unless the encoder uses the word vectors of the files.

    With transformers 5.0 and 5.1 it does not: `encoder.embed_tokens` stays untied from `shared`,
    all zeros (pull request 43880 of transformers).
    """
    saved = {}
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            for name in {"encoder.embed_tokens.weight", "shared.weight"} & set(tensors.keys()):
                saved[name] = tensors.get_slice(name)[:64]
    rows = saved.get("encoder.embed_tokens.weight", saved.get("shared.weight"))
    used = encoder.encoder.embed_tokens.weight[:64]
    if rows is None or not torch.equal(rows.to(used), used):
        raise TextError(
            f"the word vectors of {path} did not reach the encoder; install a newer transformers"
        )
