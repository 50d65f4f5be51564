"""What is measured of one video of a protocol, as files: numbers, and features by encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfforcing_dfd.common import UserError, atomic_file, sha256_of
from selfforcing_dfd.metrics.backbones import ClipEncoder
from selfforcing_dfd.metrics.feature_files import Encoded, encode_files
from selfforcing_dfd.metrics.features import Encoder
from selfforcing_dfd.metrics.files import measure_file, stated
from selfforcing_dfd.metrics.windows import Window, WindowMeter
from selfforcing_dfd.protocol.exact import StretchReader
from selfforcing_dfd.protocol.folder import read_json, write_json
from selfforcing_dfd.tiny.codec import TIME


def measure_numbers(video: Path, result: Path, settings: Mapping[str, Any]) -> None:
    """All metrics of a video, of the whole and, with `window_s`, of each stretch of it.

    With `exact` what the tiny world's reading finds, in stretches of a clip's length.
    """
    fps = float(settings["fps"])
    length = max(round(fps * settings["window_s"]), 2) if settings["window_s"] else 0
    windows = WindowMeter(fps, length, settings["chunk"], settings["first_chunk"])

    stretches = StretchReader(settings["chunk"] // TIME)

    def look(frame: Tensor) -> None:
        if length:
            windows.add(frame)
        if settings["exact"]:
            stretches.add(frame)

    found = measure_file(video, fps, settings["chunk"], settings["first_chunk"], look)
    seen = windows.windows() if length else []
    content = {
        "settings": dict(settings),
        "video": sha256_of(video),
        "stamp": stamp_of(video),
        "frames": found.frames,
        "size": list(found.size),
        "speed": round(found.speed, 3),
        "numbers": json_of(found.numbers),
        "track": found.track.tolist(),
        "windows": [window_as_json(window) for window in seen],
        "exact": stretches.found() if settings["exact"] else [],
    }
    write_json(result, content)


def json_of(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: stated(value) for name, value in numbers.items()}


def window_as_json(window: Window) -> dict[str, Any]:
    start = round(window.start_s, 3)
    return {"start_s": start, "frames": window.frames, "numbers": json_of(window.numbers)}


def stamp_of(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def read_numbers(result: Path, video: Path) -> dict[str, Any]:
    """What `measure_numbers` wrote. UserError if the video is another one now."""
    content: dict[str, Any] = read_json(result)
    if content["stamp"] != stamp_of(video) and content["video"] != sha256_of(video):
        raise UserError(
            f"{video} has changed since it was measured; delete {result} and the features of the "
            "same name, and measure it again"
        )
    return content


def measure_features(video: Path, result: Path, encoder: Encoder, prompt: str) -> None:
    """What one encoder sees in a video: unit vectors, of frames as they are and standardised.

    Beside them stands the vector of the prompt, if the encoder has text in the same space.
    """
    (found,) = encode_files([video], [encoder], None, both=True)
    tensors = {"frames": found.frames[0], "standardised": found.standardised[0]}
    if isinstance(encoder, ClipEncoder) and encoder.name == "clip_projected":
        tensors["text"] = encoder.texts([prompt])[0]
    about = {
        "encoder": json.dumps(encoder.described(), sort_keys=True),
        "name": encoder.name,
        "video": sha256_of(video),
    }
    with atomic_file(result) as partial:
        save_file(tensors, partial, about)


def read_features(results: list[Path], videos: list[Path], hashes: list[str]) -> Encoded:
    """Features of a method's videos by one encoder. UserError where a video is another one."""
    frames = []
    standardised = []
    for result, video, wanted in zip(results, videos, hashes, strict=True):
        with safe_open(result, framework="pt") as file:
            if file.metadata()["video"] != wanted:
                raise UserError(f"{result} is of another video than {video}; delete it")
            frames.append(file.get_tensor("frames"))
            standardised.append(file.get_tensor("standardised"))
    return Encoded(videos, torch.stack(frames), torch.stack(standardised))


def read_alignment(result: Path) -> float | None:
    """Mean cosine of a video's frames and its prompt; None for encoders without text."""
    with safe_open(result, framework="pt") as file:
        if "text" not in set(file.keys()):
            return None
        return float((file.get_tensor("frames") @ file.get_tensor("text")).mean())


def read_encoder(results: list[Path]) -> tuple[str, dict[str, Any]]:
    """(name, description) of the encoder that made these files. UserError for several."""
    found: dict[tuple[str, str], Path] = {}
    for result in results:
        with safe_open(result, framework="pt") as file:
            about = file.metadata()
        found.setdefault((about["name"], about["encoder"]), result)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"{one} and {other} are by two versions of an encoder; delete those of one and run "
            "the protocol again"
        )
    ((name, described),) = found
    return name, json.loads(described)
