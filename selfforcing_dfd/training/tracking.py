"""Metrics of a run: JSON lines always, and the trackers of accelerate where asked for.

A line's key is its kind of turn and the count of such turns: (`fake`, 7). It also names the student
update that it belongs to; a fake-score turn belongs to the one that it prepares. A resume drops the
lines of turns that come again and no others, so nothing is lost or there twice, wherever in a cycle
a run was stopped.
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from torch import Tensor

from selfforcing_dfd.common import UserError, atomic_file
from selfforcing_dfd.training.clock import TURNS, Clock

if TYPE_CHECKING:  # accelerate's trackers are imported when a config asks for one
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"
SAMPLES = "fixed_samples"  # always the same clips: what trackers call their scores and pictures
RESERVED = ("kind", "count", "student_update")


class TrackingError(UserError):
    """Metrics that cannot be read or would be mixed with others, or a tracker that is not there."""


class Tracker:
    """Writes what a run measures to `folder`; with several processes, only the first has one.

    trackers: names that accelerate knows (tensorboard, wandb, ...), which get the same numbers;
    project: what hosted trackers file the run under. TensorBoard's event files lie in
    folder/tensorboard. Nothing is touched before `open`. Raises TrackingError like
    `check_trackers`.
    """

    def __init__(
        self, folder: Path | str, *, trackers: Sequence[str] = (), project: str = "selfforcing_dfd"
    ) -> None:
        check_trackers(trackers)
        self._folder = Path(folder)
        self._names = tuple(trackers)
        self._project = project
        self._lines: TextIO | None = None
        self._trackers: list[GeneralTracker] = []

    def open(self, resume_at: Clock | None = None) -> None:
        """Begin. `resume_at`: the clock of the checkpoint to continue from.

        Lines beyond it are dropped. None is a new run (the first `log` begins one too), for which
        TrackingError in a folder that holds another run's metrics.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / METRICS_FILE
        kept: list[dict[str, Any]] = []
        if resume_at is not None:
            kept = _drop_later_lines(path, resume_at)
        elif path.exists() and path.stat().st_size:
            raise TrackingError(
                f"{path} already holds a run's metrics; "
                "resume that run, or give this one another folder"
            )
        self._lines = path.open("a", encoding="utf-8")
        if self._names:
            self._trackers = _start(self._names, self._folder, self._project, resume_at)
        done = 0 if resume_at is None else resume_at.student_updates
        self._log_again([line for line in kept if line["student_update"] > done])

    def log(self, kind: str, student_update: int, values: Mapping[str, float], count: int) -> None:
        """Write one line now. `kind`: whose turn it was; count: of such turns, with this one.

        A value that is not finite becomes null in the file.
        """
        taken = [name for name in RESERVED if name in values]
        if taken:
            raise ValueError(
                f"a metric may not be called {taken[0]}: {', '.join(RESERVED)} name the line itself"
            )
        if self._lines is None:
            self.open()
        assert self._lines is not None
        line: dict[str, Any] = {"kind": kind, "count": count, "student_update": student_update}
        for name, value in values.items():
            line[name] = float(value) if math.isfinite(value) else None
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        for tracker in self._trackers:
            _log(tracker, _curves(kind, values), student_update)

    def _log_again(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Turns of a cycle that was begun: TensorBoard forgets them, as it counts cycles alone."""
        for line in lines:
            numbers = {
                name: value
                for name, value in line.items()
                if name not in RESERVED and value is not None
            }
            for tracker in self._trackers:
                if tracker.name == "tensorboard":
                    _log(tracker, _curves(line["kind"], numbers), line["student_update"])

    @property
    def takes_pictures(self) -> bool:
        """Whether some tracker that is running can show images."""
        return any(_shows(tracker) for tracker in self._trackers)

    def log_pictures(self, student_update: int, pictures: Mapping[str, Tensor]) -> None:
        """Images [N, H, W, 3] uint8 by name, to the trackers that can show them."""
        for tracker in self._trackers:
            if _shows(tracker) and pictures:
                # of accelerate's trackers, only TensorBoard's asks for the order of axes
                order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                arrays = {name: images.cpu().numpy() for name, images in pictures.items()}
                tracker.log_images(arrays, step=_step(tracker, student_update), **order)

    def log_samples(self, student_update: int, scores: Mapping[str, float], video: Tensor) -> None:
        """Scores of samples, and the middle frame of their video [T, H, W, 3] uint8, to trackers.

        Scores that are not finite are left out.
        """
        known = {key: value for key, value in scores.items() if math.isfinite(value)}
        for tracker in self._trackers:
            _log(tracker, _curves(SAMPLES, known), student_update)
        middle = len(video) // 2
        self.log_pictures(student_update, {SAMPLES: video[middle : middle + 1]})

    def close(self) -> None:
        """Finish all trackers. Logging again needs `open(resume_at)`."""
        if self._lines is not None:
            self._lines.close()
        for tracker in self._trackers:
            tracker.finish()
        self._lines = None
        self._trackers = []


def check_trackers(names: Sequence[str]) -> None:
    """TrackingError for a name that accelerate does not know or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    own = set(LoggerType.list())  # the others were registered by the user, so they are there
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise TrackingError(f"log.trackers names {name!r}; accelerate knows {known}")
        if name in own and name not in installed:
            raise TrackingError(
                f"log.trackers names {name}, which is not installed: "
                f"{_how_to_install(name)}, or take it out of log.trackers"
            )


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Lines of a metrics file, without a last line that a kill or a power cut left unfinished.

    TrackingError for any other damage.
    """
    try:
        *complete, tail = Path(path).read_text(encoding="utf-8").rstrip("\0").split("\n")
    except UnicodeDecodeError as error:
        raise TrackingError(f"{path} is not UTF-8 text ({error}); {_cure(path)}") from error
    if tail:
        logger.warning("%s: the last line was cut short and is left out: %.60s", path, tail)
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            lines.append(read_line(text))
        except ValueError as error:
            raise TrackingError(f"{path}, line {number}: {error}; {_cure(path)}") from error
    return lines


def _cure(path: Path | str) -> str:
    return f"`selfforcing-dfd doctor {Path(path).parent} --mend` keeps all other lines"


def read_line(text: str) -> dict[str, Any]:
    """One line of a metrics file. Raises ValueError for anything else."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {text[:60]!r}") from error
    if not isinstance(line, dict) or not isinstance(line.get("student_update"), int):
        raise ValueError(f"no student_update in {text[:60]!r}")
    if line.get("kind") not in TURNS:
        raise ValueError(f"no kind of turn in {text[:60]!r}")
    return line


def _drop_later_lines(path: Path, done: Clock) -> list[dict[str, Any]]:
    """Rewrite the file without turns that come again, and return the other lines.

    A kill leaves the old file or the new.
    """
    if not path.exists():
        return []
    lines = read_metrics(path)
    counted = zip(lines, counts_of(lines), strict=True)
    kept = [line for line, count in counted if count <= done.count(line["kind"])]
    with atomic_file(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


def counts_of(lines: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """The count of each line among those of its kind; older files do not state it."""
    seen: Counter[str] = Counter()
    for line in lines:
        seen[line["kind"]] += 1
        yield line.get("count", seen[line["kind"]])


def _start(
    names: Sequence[str], folder: Path, project: str, resume_at: Clock | None
) -> list[GeneralTracker]:
    """The trackers of accelerate, started. TensorBoard and wandb go on with a resumed run's curves.

    Other trackers begin a run of their own at every resume.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether this is the main process
    options: dict[str, dict[str, Any]] = {}
    if "tensorboard" in names:
        purge_step = None if resume_at is None else resume_at.student_updates + 1
        options["tensorboard"] = {"purge_step": purge_step}
    if "wandb" in names:
        options["wandb"] = {
            "name": folder.name,
            "id": _wandb_id(folder),
            "dir": str(folder),
            "resume": "allow",
        }
    started = []
    for name in dict.fromkeys(names):
        make = LOGGER_TYPE_TO_CLASS[name]
        # accelerate joins the two: TensorBoard's files lie in folder/tensorboard
        place = (name, folder) if make.requires_logging_directory else (project,)
        tracker = make(*place, **options.get(name, {}))
        tracker.start()
        if name == "wandb":
            tracker.tracker.define_metric("*", step_metric="student_update")
        started.append(tracker)
    return started


def _wandb_id(folder: Path) -> str:
    """The run's id at Weights & Biases, kept in the folder so that a resume finds its curves."""
    path = folder / WANDB_ID_FILE
    if not path.exists():
        with atomic_file(path) as partial:
            partial.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _curves(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Numbers of one turn by the names that trackers show."""
    return {f"{kind}/{_plain(name)}": float(value) for name, value in values.items()}


def _log(tracker: GeneralTracker, curves: Mapping[str, float], student_update: int) -> None:
    step = _step(tracker, student_update)
    axis = {"student_update": student_update} if step is None else {}
    tracker.log({**axis, **curves}, step=step)


def _step(tracker: GeneralTracker, student_update: int) -> int | None:
    """None for wandb, whose own step only grows: it would drop what a resume writes again."""
    return None if tracker.name == "wandb" else student_update


def _shows(tracker: GeneralTracker) -> bool:
    return hasattr(tracker, "log_images")


def _plain(name: str) -> str:
    """A metric's name in letters that every tracker takes; MLflow refuses `<` and `=`."""
    return name.replace("<=", " up to ")


def _how_to_install(name: str) -> str:
    if name in ("tensorboard", "wandb"):
        return "pip install 'selfforcing_dfd[track]'"
    return f"pip install {name}"
