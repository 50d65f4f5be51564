"""Metrics of a run, and the check that stops it before a value that is not finite reaches the
weights.

JSON lines are always written; TensorBoard and Weights & Biases are further sinks for the same
numbers, imported when asked for. Every line belongs to a student update, a fake-score turn to the
one it prepares. So a resume after update n forgets the lines beyond n and writes them again: curves
have no duplicates.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from selfforcing_dfd.common import UserError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
RESERVED = ("kind", "student_update")


class NonFiniteError(UserError):
    """A loss or gradient became infinite or not a number; the optimizer step was not taken."""


class Sink(Protocol):
    """Where numbers go besides the JSON lines."""

    def log(self, kind: str, student_update: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes what a run measures to `folder`; with several processes, only the first has one.

    tensorboard: also event files in folder/tensorboard. wandb_project: also Weights & Biases, empty
    for not; ValueError if it is not installed. Nothing is touched before `open`.
    """

    def __init__(
        self, folder: Path | str, *, tensorboard: bool = False, wandb_project: str = ""
    ) -> None:
        self._folder = Path(folder)
        self._tensorboard = tensorboard
        self._wandb_project = wandb_project
        self._lines: TextIO | None = None
        self._sinks: list[Sink] = []
        if wandb_project:
            _require_wandb()

    def open(self, resume_at: int | None = None) -> None:
        """Begin. `resume_at`: student updates of the checkpoint to continue from; lines beyond it
        are dropped.

        None is a new run (the first `log` begins one too): ValueError in a folder that holds
        another run's metrics.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS_FILE
        if resume_at is not None:
            _drop_later_lines(path, resume_at)
        elif path.exists() and path.stat().st_size:
            raise ValueError(
                f"{path} already holds a run's metrics; resume that run, or give this one another folder"
            )
        self._lines = path.open("a", encoding="utf-8")
        if self._tensorboard:
            self._sinks.append(_TensorBoard(self._folder / "tensorboard", resume_at))
        if self._wandb_project:
            self._sinks.append(_Wandb(self._folder, self._wandb_project))

    def log(self, kind: str, student_update: int, values: Mapping[str, float]) -> None:
        """Write one line now. `kind` says who speaks (student, fake); values that are not finite
        become null.
        """
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(
                f"a metric may not be called {taken[0]}: {', '.join(RESERVED)} name the line itself"
            )
        if self._lines is None:
            self.open()
        assert self._lines is not None
        numbers = {name: float(value) for name, value in values.items()}
        line: dict[str, Any] = {"kind": kind, "student_update": student_update}
        line |= {
            name: number if math.isfinite(number) else None for name, number in numbers.items()
        }
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        for sink in self._sinks:
            sink.log(kind, student_update, numbers)

    def close(self) -> None:
        """Finish all sinks. Logging again needs `open(resume_at)`."""
        if self._lines is not None:
            self._lines.close()
        for sink in self._sinks:
            sink.close()
        self._lines, self._sinks = None, []


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Lines of a metrics file. A last line cut short by a kill is left out; any other damage is a
    ValueError.
    """
    *complete, tail = Path(path).read_text(encoding="utf-8").split("\n")
    if tail:
        logger.warning("%s: the last line was cut short and is left out: %.60s", path, tail)
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON: {text[:60]!r}; repair or remove that line"
            ) from error
        if not isinstance(line, dict) or not isinstance(line.get("student_update"), int):
            raise ValueError(
                f"{path}, line {number}: no student_update in {text[:60]!r}; repair or remove that line"
            )
        lines.append(line)
    return lines


def _drop_later_lines(path: Path, resume_at: int) -> None:
    """Rewrite the file without lines beyond `resume_at`; a kill leaves either the old file or the
    new one.
    """
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["student_update"] <= resume_at]
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class _TensorBoard:
    """One scalar per metric, tagged kind/name; on resume the curves beyond the checkpoint are
    purged.
    """

    def __init__(self, folder: Path, resume_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, kind: str, student_update: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, student_update)

    def close(self) -> None:
        self._writer.close()


def _require_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "the config asks for wandb, which is not installed: pip install wandb, or name no project"
        )


class _Wandb:
    """Metrics over an axis `student_update`: wandb's own step only grows and would drop what a
    resume replays.

    The run's id stays in the folder, so that a resume continues its curves.
    """

    def __init__(self, folder: Path, project: str) -> None:
        import wandb

        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex, encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8")
        self._run = wandb.init(
            project=project, name=folder.name, id=run_id, dir=str(folder), resume="allow"
        )
        self._run.define_metric("*", step_metric="student_update")

    def log(self, kind: str, student_update: int, values: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"student_update": student_update, **named})

    def close(self) -> None:
        self._run.finish()


def require_finite(name: str, value: float | Tensor, where: str) -> None:
    """NonFiniteError unless every value is finite. `where` says the update and the turn: "student
    update 12".
    """
    tensor = torch.as_tensor(value)
    bad = _count_bad(tensor)
    if bad:
        shown = (
            str(tensor.item())
            if tensor.numel() == 1
            else f"not finite in {bad} of {tensor.numel()} values"
        )
        raise NonFiniteError(_advice(f"{name} is {shown}", where))


def check_finite(
    loss: Tensor, named_grads: Iterable[tuple[str, Tensor | None]], where: str
) -> Tensor:
    """The norm of all gradients together (0-d, at least float32), or NonFiniteError; call before
    the optimizer step.

    named_grads: parameter names with their `.grad`; None (no gradient) counts as zero. The error
    names the first parameter whose gradient is not finite.
    """
    require_finite("loss", loss.detach(), where)
    grads = [(name, grad.detach()) for name, grad in named_grads if grad is not None]
    if not grads:
        raise ValueError(
            f"no parameter has a gradient at {where}; call backward() first, then pass (name, grad)"
        )
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for _, g in grads
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    total = total.full_tensor() if isinstance(total, DTensor) else total
    if not math.isfinite(total.item()):
        _raise_for_gradient(grads, where)
    return total


def _raise_for_gradient(grads: list[tuple[str, Tensor]], where: str) -> None:
    for name, grad in grads:
        bad = _count_bad(grad)
        if bad:
            raise NonFiniteError(
                _advice(
                    f"gradient of {name} is not finite in {bad} of {grad.numel()} values", where
                )
            )
    raise NonFiniteError(_advice(f"the norm over {len(grads)} gradients overflows", where))


def _count_bad(tensor: Tensor) -> int:
    bad = (~torch.isfinite(tensor)).sum()
    return int((bad.full_tensor() if isinstance(bad, DTensor) else bad).item())


def _advice(what: str, where: str) -> str:
    return (
        f"{what} at {where}. The optimizer step was not taken, so the weights are as before. Look at the last lines of "
        f"{METRICS_FILE} for a growing loss or gradient norm, then at that batch's data; a lower learning rate or "
        "tighter gradient clipping helps if the growth came first"
    )
