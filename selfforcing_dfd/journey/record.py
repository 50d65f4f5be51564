"""What a journey has done: each step with its inputs and results, by hash, in one sealed file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfforcing_dfd.common import atomic_file, is_as_sealed, sealed, sha256_of
from selfforcing_dfd.data.sources.listing import Clip, list_hash
from selfforcing_dfd.journey.checkpoint import JourneyError

RECORD_FILE = "journey.json"
VERSION = 1
END_BYTES = 1 << 20  # of a video's beginning and end that are hashed


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was begun, or done.

    inputs: by name, hashes or short texts. results: files with their SHA-256.
    """

    inputs: Mapping[str, str]
    results: Mapping[str, str]
    finished: bool = True


class Record:
    """The steps that are done, on disk after each of them."""

    def __init__(self, folder: Path) -> None:
        """Raises JourneyError for a record that is damaged or was changed by hand."""
        self.folder = folder
        self.steps: dict[str, Done] = {}
        path = folder / RECORD_FILE
        if path.is_file():
            self.steps = read_steps(path)

    def begin(self, name: str, inputs: Mapping[str, str]) -> None:
        """Write down that a step begins: what a stop leaves of it is of these inputs."""
        self.steps[name] = Done(dict(inputs), {}, finished=False)
        self.write()

    def note(self, name: str, inputs: Mapping[str, str], results: Iterable[Path]) -> None:
        """Write down a step that is done. results: files in the journey's folder."""
        described = {self.relative(path): sha256_of(path) for path in results}
        self.steps[name] = Done(dict(inputs), described)
        self.write()

    def write(self) -> None:
        steps = {name: dataclasses.asdict(done) for name, done in self.steps.items()}
        content = sealed({"version": VERSION, "steps": steps})
        with atomic_file(self.folder / RECORD_FILE) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def changed_inputs(self, name: str, inputs: Mapping[str, str]) -> list[str]:
        """Names of inputs that are others than when the step was done."""
        done = self.steps[name]
        names = sorted({*done.inputs, *inputs})
        return [each for each in names if done.inputs.get(each) != inputs.get(each)]

    def lost_result(self, name: str) -> str:
        """The first file of a step that is missing or was changed; empty if none is."""
        for file, sha256 in self.steps[name].results.items():
            path = self.folder / file
            if not path.is_file() or sha256_of(path) != sha256:
                return file
        return ""


def read_steps(path: Path) -> dict[str, Done]:
    """The steps in a record. Raises JourneyError."""
    cure = f"remove it together with {path.parent}/shards; runs that are trained are found again"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise JourneyError(f"{path} cannot be read ({error}); {cure}") from error
    if not isinstance(content, dict) or not is_as_sealed(content):
        raise JourneyError(f"{path} is not what was written; {cure}")
    if content.get("version") != VERSION:
        raise JourneyError(
            f"{path} has version {content.get('version')}, and this program reads {VERSION}; "
            "use the version that wrote it, or another --out"
        )
    return {name: Done(**step) for name, step in content["steps"].items()}


def clips_hash(clips: Iterable[Clip]) -> str:
    """Of the videos and their captions: names, sizes, and the first and last MiB of each file.

    Whole videos may be terabytes.
    """
    listed = list(clips)
    digest = hashlib.sha256(list_hash(listed).encode())
    for clip in listed:
        if clip.path.is_file():
            digest.update(ends_of(clip.path))
    return digest.hexdigest()


def ends_of(path: Path) -> bytes:
    """The first and the last MiB of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(END_BYTES)
        file.seek(max(size - END_BYTES, 0))
        return first + file.read(END_BYTES)


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
