"""Stage `tests`: what `tests/gpu` says on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]
REHEARSAL = "SELFFORCING_DFD_REHEARSAL"
"""Set to 1, tests/gpu runs on the CPU at small sizes: to find what is mistyped."""
SPARE_S = 5
AT_ONCE = 5
"""Files. Each takes up to 25 GB of the GPU."""
COMPILERS = "4"
"""Processes that compile for one file; by itself each would start as many as there are cores."""
FIRST = ("streaming_gpu", "attention_kernels", "compile_gpu", "true_size_gpu", "training_gpu")


def measure(record: Record) -> None:
    """A row for each file. On a GPU several run at once: most of their time goes to compilers."""
    names = [name for name in files() if record.wants(name)]
    with ThreadPoolExecutor(AT_ONCE if record.machine.on_gpu else 1) as pool:
        running = {name: pool.submit(run_file, record, name) for name in names}
        for name in names:
            record.row(name, running[name].result)


def files() -> list[str]:
    """Of tests/gpu: first those behind the figures that are quoted."""
    found = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    first = [f"test_{name}.py" for name in FIRST]
    return [name for name in first if name in found] + sorted(found - set(first))


def run_file(record: Record, name: str) -> dict[str, Any]:
    """Counts of one file's tests, and the names and messages of those that failed."""
    # plugins that a machine happens to have are none of ours
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if not record.machine.on_gpu:
        environment[REHEARSAL] = "1"
    else:
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = COMPILERS
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-vv", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", f"tests/gpu/{name}", *options]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(record.left_s - SPARE_S, SPARE_S),
        )
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report: {(done.stdout + done.stderr)[-500:]}")
        return counts(report)


def counts(report: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = {}
    for case in cases:
        faults = [*case.iter("failure"), *case.iter("error")]
        if faults:
            failed[case.get("name", "")] = faults[0].get("message", "")[:300]
    empty = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - empty
    return {"passed": passed, "not for this machine": empty, "failed": failed}
