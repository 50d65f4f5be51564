"""Runs: damaged checkpoints and results, and settings that training itself must survive."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from safetensors.torch import load_file

from selfforcing_dfd.common import UserError, shipped
from selfforcing_dfd.data.sources.tiny import make_tiny_shards
from selfforcing_dfd.training.build import build_network
from tests.attack.configs import settings_of
from tests.attack.harms import copy, files_in, harm_file
from tests.attack.trials import Kind, Tell, Wrong, command
from tests.tiny_models import fill_weights, save_network
from tests.training.conftest import MODEL, arguments

RECIPE = "run: {stage: dfd}\n"
FEW = ["run.stage=dmd", "score.fake_per_student=1", "batch.size=2", "batch.micro=2"]
FEW += ["checkpoint.every=1", "run.student_updates=3", "rollout.ladder=[1000]"]
RESULTS = ("student.safetensors", "fake.safetensors")
FREE = ("journal.jsonl", "metrics.jsonl")
"""Files for people to read, which hold no checksum; weights do not depend on them."""
FIXED = ("run.out", "run.name", "run.stage", "run.timeout_s", "data.shards", "log.project")
NUMBERS = ("-1", "0", "1", "2", "3", "0.5", "1e-30", "1e30", "nan", "inf", "-inf", "99" * 12)
WORDS = ("x", "", "null", "true", "[]", "[1,2]", "{}")
TRIED = (
    *("optim.student", "optim.fake", "optim.regression", "ema", "checkpoint", "score", "dfd"),
    *("regression", "guards", "data", "batch", "rollout", "model", "log", "run", "teacher"),
)
LONG = ("compile", "steps", "clips", "updates", "workers", "per_student")
"""Endings of settings with which one update may take long, and rightly so."""


def make_world(folder: Path) -> None:
    """Six clips and a teacher of one layer."""
    teacher = build_network(MODEL)
    fill_weights(teacher, seed=1)
    save_network(folder / "teacher.safetensors", teacher)
    basis = shipped("assets/tiny/codec.safetensors")
    make_tiny_shards(folder / "shards", 6, 0, "short", 9, basis)
    (folder / "recipe.yaml").write_text(RECIPE)


def train(world: Path, place: Path, *words: str) -> str:
    """What `train` says of a run in `place`."""
    settings = [*arguments(world, place), *FEW]
    return command("train", "--config", str(world / "recipe.yaml"), *settings, *words)


class Runs(Kind):
    """A run goes on to the very weights that it would have had, or says why not."""

    name = "runs"

    def prepare(self, folder: Path) -> None:
        self.world = folder
        make_world(folder)
        train(folder, folder / "part", "run.student_updates=2")
        shutil.copytree(folder / "part" / "runs", folder / "whole" / "runs")
        train(folder, folder / "whole", "--resume")
        self.wanted = results(folder / "whole" / "runs" / "run")

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        original = self.world / chance.choice(("part", "part", "whole")) / "runs"
        runs = copy(original, place)
        folder = runs / "run"
        if chance.random() < 0.15:
            tell(foreign(folder, chance))
        else:
            tell(harm_file(chance.choice(files_in(folder)), chance))
        check_verify(folder, original / "run")
        train(self.world, place, "--resume")
        if results(folder) != self.wanted:
            raise Wrong("the run went on to other weights")
        command("inspect", str(folder))


class Trainings(Kind):
    """Settings that training has to survive: it ends with finite weights, or with a message."""

    name = "trainings"

    def prepare(self, folder: Path) -> None:
        self.world = folder
        make_world(folder)
        known = settings_of(str(folder / "recipe.yaml"), *arguments(folder, folder), *FEW)
        self.settings = [
            each
            for each in known
            if each.startswith(TRIED) and not each.endswith(LONG) and each not in FIXED
        ]

    def attack(self, chance: random.Random, place: Path, tell: Tell) -> None:
        names = chance.sample(self.settings, chance.randint(1, 2))
        chosen = [f"{name}={chance.choice((*NUMBERS, *WORDS))}" for name in names]
        tell(" ".join(chosen))
        train(self.world, place, "run.student_updates=1", *chosen)
        (student,) = place.rglob("student.safetensors")
        bad = [name for name, tensor in load_file(student).items() if not tensor.isfinite().all()]
        if bad:
            raise Wrong(f"exported weights are not finite: {bad[:3]}")


def check_verify(folder: Path, original: Path) -> None:
    """Wrong if `verify` calls a file whole that is not as it was."""
    names = [path.relative_to(original) for path in files_in(original)]
    if not any((folder / "checkpoints").iterdir()) and (folder / RESULTS[0]).is_file():
        return  # a finished run needs none
    watched = [name for name in names if name.name not in FREE and not name.name.startswith(".")]
    try:
        command("verify", str(folder))
    except UserError:
        return
    for name in watched:
        path = folder / name
        if not path.is_file() or path.read_bytes() != (original / name).read_bytes():
            raise Wrong(f"verify has nothing to say of {name}")


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS}


def foreign(folder: Path, chance: random.Random) -> str:
    """A checkpoint with what belongs to another, or with a lie that is sealed."""
    checkpoints = sorted((folder / "checkpoints").iterdir())
    newest = checkpoints[-1]
    how = chance.randrange(4)
    if how == 0:
        target = newest.with_name("student_update=000003")
        shutil.copytree(newest, target)
        return f"{newest.name} under the name {target.name}"
    if how == 1:
        shutil.rmtree(newest)
        newest.symlink_to(checkpoints[0].name)
        return f"{newest.name} is a link to {checkpoints[0].name}"
    if how == 2:
        for path in checkpoints:
            shutil.rmtree(path)
        return "all checkpoints deleted"
    shutil.copyfile(checkpoints[0] / "meta.json", newest / "meta.json")
    return f"meta.json of {checkpoints[0].name} in {newest.name}"
