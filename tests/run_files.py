"""The record of a finished run beside weights that no training made."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.weights.run_record import RunRecord, describe_result, write_record


def finish(folder: Path, student_updates: int = 1, config: str | None = None) -> None:
    """Write run.json for the weights in a folder; by default with the settings in config.yaml."""
    text = (folder / "config.yaml").read_text() if config is None else config
    results = {path.name: describe_result(path) for path in folder.glob("*.safetensors")}
    record = RunRecord(
        state="finished",
        config=text,
        weights={},
        data="",
        results=results,
        student_updates=student_updates,
    )
    write_record(folder, record)
