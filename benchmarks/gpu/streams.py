"""Stages `stream-...`: the benchmark's own command, once for each setting.

Each runs in a process of its own, so memory, compiled programs and failures are its own too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.kernels import usable
from benchmarks.gpu.record import Machine, Missing, Record
from selfforcing_dfd.cli.stream_commands import benchmark
from selfforcing_dfd.models.fp8 import Fp8Error, check_device, check_package

ROOT = Path(__file__).parents[2]
SIZE = ("--random-weights", "wan1.3b", "--dtype", "bfloat16")
LENGTH = ("--chunks", "20", "--warmup", "5", "--prompt-trials", "3")
SMALL_SIZE = ("--random-weights", "wan-tiny", "--device", "cpu", "--threads", "1")
SMALL_LENGTH = ("--chunks", "1", "--warmup", "0", "--prompt-trials", "1")
BEST = "BEST"
"""Environment variable: options of the fastest setting, for stage `final`."""
SPARE_S = 5
NEEDS_S = 80.0
"""Seconds without which no stream begins. Predicted: 60 to 80 s, with a compiler up to 200."""
FINAL_NEEDS_S = 300.0


GROUPS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("streams.yaml").read_text()
)
"""Options by the name of a setting, by stage."""


def stage_of(group: str) -> Callable[[Record], None]:
    def measure(record: Record) -> None:
        for name, options in GROUPS[group].items():
            record.row(name, partial(stream, record, options), needs_s(record, NEEDS_S))

    return measure


def final(record: Record) -> None:
    """200 chunks of the best setting, which the caller names: the figures to quote."""
    options = os.environ.get(BEST, "--attention auto --compile")
    length = ("--chunks", "200", "--warmup", "10", "--prompt-trials", "20", "--dit-only")
    record.row("best", lambda: stream(record, options, length), needs_s(record, FINAL_NEEDS_S))


def needs_s(record: Record, on_gpu_s: float) -> float:
    return on_gpu_s if record.machine.on_gpu else 0.0


def stream(record: Record, options: str, length: tuple[str, ...] = LENGTH) -> dict[str, Any]:
    """The benchmark's JSON of one setting. Raises Missing for what is not there."""
    machine = record.machine
    words = list(rehearsed(options.split()) if machine.small else options.split())
    unknown = [word for word in words if word.startswith("--") and word not in known_options()]
    if unknown:
        raise Missing(f"this version has no {', '.join(unknown)}")
    if "--cuda-graph" in words and not machine.on_gpu:
        raise Missing("CUDA graphs need a CUDA device")
    if "--offload" in words and machine.small:
        raise Missing("offloading is for a GPU, and the blocks of a rehearsal are too few")
    if "--fp8" in words:
        require_fp8(machine)
    if "--attention" in words and not machine.small:
        name = words[words.index("--attention") + 1]
        if name != "auto":
            usable(machine, name, 128)
    environment = dict(os.environ)
    if machine.small:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # inductor takes minutes on a CPU
        return run(SMALL_SIZE + SMALL_LENGTH + tuple(words), environment, record.left_s)
    return run(SIZE + length + tuple(words), environment, record.left_s)


def require_fp8(machine: Machine) -> None:
    """Raise Missing where 8-bit linear layers cannot run, before a process is started for them."""
    try:
        check_package()
        check_device(machine.device, torch.bfloat16)
    except Fp8Error as why:
        raise Missing(str(why)) from why


def rehearsed(words: list[str]) -> Iterator[str]:
    """The same options where there is no GPU: torch's kernel in place of others."""
    for before, word in zip(["", *words], words, strict=False):
        if before == "--attention" and word not in ("auto", "sdpa"):
            yield "sdpa"
        else:
            yield {"umt5": "umt5-small"}.get(word, word)


@cache
def known_options() -> frozenset[str]:
    """Of this version's benchmark command."""
    parser = argparse.ArgumentParser()
    benchmark(parser)
    words = parser.format_help().replace(",", " ").replace("[", " ").replace("]", " ").split()
    return frozenset(word for word in words if word.startswith("--"))


def run(words: tuple[str, ...], environment: dict[str, str], left_s: float) -> dict[str, Any]:
    """What the command found. Raises RuntimeError with its last words where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "selfforcing_dfd", "benchmark", *words, "--out", str(out)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(left_s - SPARE_S, SPARE_S),
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()[-600:]}")
        result: dict[str, Any] = json.loads(out.read_text())
    return {"options": " ".join(words), **result}
