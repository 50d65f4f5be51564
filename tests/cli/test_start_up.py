"""What a stream and a benchmark import before their first picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = (
    *("diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "scipy", "sympy"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "jinja2", "starlette"),
)
"""Each takes from .1 to 3 seconds to import, beside 1.3 of torch itself."""
STREAM = """
from selfforcing_dfd.live.play import prepare
from selfforcing_dfd.streaming.session import StreamSession
model, settings = prepare(parse(["stream", "--device", "cpu"]))
StreamSession(model, "a disc moves", settings).next_chunk()
"""
BENCHMARK = """
from selfforcing_dfd.benchmark import run
from selfforcing_dfd.benchmark.measure import Bench, Plan
settings = run.load_settings("default")
model = run.build_model(parse(["benchmark", "--device", "cpu"]), settings)
Bench(model, settings, run.PROMPTS, Plan()).start()
"""


@pytest.mark.parametrize("program", [STREAM, BENCHMARK], ids=["stream", "benchmark"])
def test_the_tiny_world_starts_with_little_more_than_torch(program):
    """Catches an import at the top of a module by which every start takes seconds more."""
    lines = (
        "import sys",
        "from selfforcing_dfd.cli.main import parse",
        program,
        f"print('slow', *[name for name in {SLOW} if name in sys.modules])",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "slow"
