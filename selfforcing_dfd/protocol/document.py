"""The result file of a protocol: every number with what it takes to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import av
import torch

import selfforcing_dfd
from selfforcing_dfd.metrics.feature_files import scores_as_json
from selfforcing_dfd.metrics.files import SCHEMA
from selfforcing_dfd.metrics.video import METRICS_VERSION
from selfforcing_dfd.protocol.compare import Difference
from selfforcing_dfd.protocol.folder import read_json
from selfforcing_dfd.protocol.plan import hash_of
from selfforcing_dfd.protocol.prepared import Prepared
from selfforcing_dfd.protocol.results import Result


def evaluation_of(
    prepared: Prepared, results: Mapping[str, Result], differences: Sequence[Difference]
) -> dict[str, Any]:
    """What `evaluation.json` holds."""
    protocol = prepared.protocol
    methods = {name: method_as_json(prepared, result) for name, result in results.items()}
    prompts = [asdict(prompt) for prompt in prepared.prompts]
    return {
        "schema": SCHEMA,
        "metrics": METRICS_VERSION,
        "protocol": prepared.name,
        "settings": prepared.measuring(),
        "prompts": {
            "sha256": hash_of(prepared.prompts),
            "number": len(prepared.prompts),
            "extended": protocol.extended,
            "texts": prompts,
        },
        "seeds": list(protocol.seeds),
        "references": {"teacher": protocol.teacher, "data": protocol.data},
        "control": protocol.control,
        "unit": protocol.unit,
        "software": {
            "selfforcing_dfd": selfforcing_dfd.__version__,
            "torch": torch.__version__,
            "pyav": av.__version__,
        },
        "methods": methods,
        "no_features": dict(prepared.no_features),
        "differences": [difference.as_json() for difference in differences],
        "paper": None if protocol.paper is None else asdict(protocol.paper),
    }


def method_as_json(prepared: Prepared, result: Result) -> dict[str, Any]:
    """One method: what made its videos, its scores, and every video."""
    plan = prepared.protocol.methods[result.method]
    found: dict[str, Any] = {"about": plan.about, "plan": asdict(plan)}
    if result.method in prepared.not_run:
        return found | {"not_run": prepared.not_run[result.method]}
    wanted = len(prepared.cells(result.method))
    scores = {name: result.score(name) for name in result.names}
    return found | {
        "made": made_by(prepared, result),
        "wanted": wanted,
        "scores": scores_as_json(scores),
        "encoders": result.encoders,
        "failures": result.failures,
        "videos": [video_as_json(prepared, result, place) for place, _ in enumerate(result.cells)],
    }


def made_by(prepared: Prepared, result: Result) -> list[dict[str, Any]]:
    """What made the videos, once for each set of prompts and each machine and version."""
    found: list[dict[str, Any]] = []
    for cell in result.cells:
        record: dict[str, Any] = {"made": prepared.made(cell)}
        if prepared.is_made_here(cell.method):
            record = read_json(prepared.folder.record(cell))
        own = dict(record["made"])
        for name in ("prompt", "seed", "image"):
            own.pop(name, None)
        about = {"set": cell.prompt.set, **own}
        about |= {name: value for name, value in record.items() if name != "made"}
        if about not in found:
            found.append(about)
    return found


def video_as_json(prepared: Prepared, result: Result, place: int) -> dict[str, Any]:
    cell = result.cells[place]
    numbers = result.numbers[place]
    own = ("video", "frames", "size", "speed", "numbers", "windows")
    about = {name: numbers[name] for name in own}
    return {
        "file": str(prepared.video(cell)),
        "sha256": about.pop("video"),
        "prompt": cell.prompt.number,
        "seed": cell.seed,
        **about,
    }
