"""Whether a run is good enough for what is built on it: bounds on scores of its report."""

from __future__ import annotations

import json

from selfforcing_dfd.common import UserError
from selfforcing_dfd.config import Config
from selfforcing_dfd.evaluation.document import REPORT_FILE
from selfforcing_dfd.evaluation.sources import runs_of
from selfforcing_dfd.training.folders import run_folder


class GateError(UserError):
    """A finished run whose scores lie outside of report.gate."""


def check_gate(config: Config) -> None:
    """Hold the report's rows of this config's own runs against report.gate.

    Raises GateError that names every score outside of its bounds, and scores that the report does
    not have. A score that is not stated fails.
    """
    if not config.report.gate:
        return
    folder = run_folder(config)
    rows = {row["name"]: row for row in json.loads((folder / REPORT_FILE).read_text())["rows"]}
    failures = []
    for name in runs_of(config):
        scores = rows[name]["scores"]
        for key, bounds in config.report.gate.items():
            if key not in scores:
                known = ", ".join(sorted(scores))
                raise GateError(f"report.gate names {key}, which the report does not have: {known}")
            low, high = bounds
            value = scores[key]["value"]
            if value is None or not low <= value <= high:
                shown = "not stated" if value is None else f"{value:.3f}"
                failures.append(f"{name}: {key} is {shown}, wanted {low:g} to {high:g}")
    if failures:
        raise GateError(
            f"{folder} does not pass its gate. {'; '.join(failures)}. Train longer "
            "(run.student_updates, with --resume), or change report.gate"
        )
