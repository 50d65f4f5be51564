"""Files of weights: safetensors and what torch.save writes, damaged or made up.

A flip inside of a tensor's values is left out: these formats hold no checksum. Files of a run have
one in its record, see `runs`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfforcing_dfd.weights.read import load_network
from tests.attack.harms import ABSURD, cut, harm_file, other
from tests.attack.trials import Kind, Tell, Wrong, command
from tests.tiny_models import save_network, tiny_network

ZIP = b"PK\x03\x04"  # how each record of such a file begins; the pickle is the first
SAFETENSORS = "student.safetensors"
TORCH = "student.pt"
JUNK: tuple[Any, ...] = (
    *(-1, 0, 3, 2**62, 2**70, 0.5, None, True, "", "x", [], [1], [0, 0], [-1, 4], {}, "F32", "I64"),
    *([0, 2**62], [2**62, 2**62, 4], "8", [1, 2, 2], float("nan")),
)


class Weights(Kind):
    """Loaded weights are all of those that were written, or none."""

    name = "weights"

    def prepare(self, folder: Path) -> None:
        network = tiny_network(0, torch.float32, num_layers=1)
        save_network(folder / SAFETENSORS, network, role="causal_student")
        tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        torch.save({"generator_ema": tensors, "step": 3}, folder / TORCH)
        self.folder = folder
        self.wanted = tensors
        command("inspect", str(folder / SAFETENSORS))  # imports, which trials then share

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        name = chance.choice((SAFETENSORS, SAFETENSORS, TORCH))
        path = place / name
        data = (self.folder / name).read_bytes()
        path.write_bytes(data)
        harms = self.of_safetensors if name == SAFETENSORS else self.of_torch
        tell(chance.choice(harms(path, data))(chance))
        command("inspect", str(path), "--head-dim", "16")
        with_head = {} if name == SAFETENSORS else {"head_dim": 16}
        got = load_network(path, **with_head).state_dict()
        changed = [key for key, tensor in self.wanted.items() if not torch.equal(got[key], tensor)]
        if changed or got.keys() != self.wanted.keys():
            raise Wrong(f"other weights were loaded: {changed[:3]}")

    def of_safetensors(self, path: Path, data: bytes) -> list[Callable[[random.Random], str]]:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        body = data[8 + length :]

        def in_header(chance: random.Random) -> str:
            changed = bytearray(data)
            place = chance.randrange(8 + length)
            changed[place] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            return f"{path.name}: a bit of byte {place}, in the header, flipped"

        def lie(chance: random.Random) -> str:
            key = chance.choice(list(header))
            entry = header[key]
            field = chance.choice(list(entry))
            entry[field] = "x" if key == "__metadata__" else chance.choice(JUNK)
            if key == "__metadata__":
                entry[field] = chance.choice((*ABSURD, *map(json.dumps, JUNK)))
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + body)
            return f"{path.name}: {key} {field} is {entry[field]!r:.80}"

        def whole(chance: random.Random) -> str:
            return harm_beyond_values(path, chance, 8 + length)

        def swapped(chance: random.Random) -> str:
            torch.save({"w": torch.zeros(3)}, path)
            return f"{path.name}: what torch.save writes, under this name"

        return [
            in_header,
            in_header,
            lie,
            lie,
            lie,
            whole,
            whole,
            swapped,
            self.other_tensors(path),
        ]

    def of_torch(self, path: Path, data: bytes) -> list[Callable[[random.Random], str]]:
        def end(chance: random.Random) -> str:
            return harm_beyond_values(path, chance, len(data))

        def in_pickle(chance: random.Random) -> str:
            changed = bytearray(data)
            place = chance.randrange(data.index(ZIP, 4))
            changed[place] = chance.randrange(256)
            path.write_bytes(changed)
            return f"{path.name}: byte {place}, in the pickle, is {changed[place]}"

        def object_in_it(chance: random.Random) -> str:
            thing = chance.choice((Path("x"), {"a": print}, [1], 3, "x", None, {}, {"a": {}}))
            torch.save(thing, path)
            return f"{path.name}: holds {thing!r}"

        return [end, end, in_pickle, in_pickle, object_in_it, self.other_tensors(path)]

    def other_tensors(self, path: Path) -> Callable[[random.Random], str]:
        """A good file of other content: shapes, dtypes, values, names."""

        def write(chance: random.Random) -> str:
            from safetensors.torch import save_file

            tensors: dict[str, Tensor] = {key: each.clone() for key, each in self.wanted.items()}
            key = chance.choice(list(tensors))
            how = chance.choice(("reshaped", "gone", "nan", "whole numbers", "renamed", "empty"))
            if how == "gone":
                del tensors[key]
            elif how == "renamed":
                tensors[f"{key}.x"] = tensors.pop(key)
            elif how == "nan":
                tensors[key].view(-1)[0] = float("nan")
            elif how == "whole numbers":
                tensors[key] = torch.zeros(tensors[key].shape, dtype=torch.int64)
            elif how == "empty":
                tensors[key] = torch.zeros(0)
            else:
                tensors[key] = torch.zeros(*tensors[key].shape, 1)
            if path.suffix == ".pt":
                torch.save(tensors, path)
            else:
                save_file(tensors, path)
            return f"{path.name}: {key} {how}"

        return write


def harm_beyond_values(path: Path, chance: random.Random, length: int) -> str:
    """Damage that a file without checksums can show: of its length, or of all its content."""
    if chance.random() < 0.4:
        return harm_file_only(path, chance)
    data = bytearray(path.read_bytes())
    said = chance.choice((cut, cut, other))(data, chance)
    path.write_bytes(data)
    return f"{path.name}: {said}"


def harm_file_only(path: Path, chance: random.Random) -> str:
    while True:
        copied = path.read_bytes()
        said = harm_file(path, chance)
        if not path.is_file() or len(path.read_bytes()) < len(copied):
            return said
        path.write_bytes(copied)
