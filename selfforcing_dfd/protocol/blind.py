"""A blind comparison of two methods: a page of pairs, and what people chose on it.

The page and its videos say nothing of methods. Which side shows which method is drawn for each pair
from a seed; it stands in a key, a file that stays with who made the page.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from selfforcing_dfd import rng
from selfforcing_dfd.common import UserError, atomic_folder, sha256_of
from selfforcing_dfd.evaluation.paired import Signs, sign_test
from selfforcing_dfd.protocol.folder import read_json, write_json
from selfforcing_dfd.protocol.plan import Cell
from selfforcing_dfd.protocol.prepared import Prepared
from selfforcing_dfd.tiny.bootstrap import Resamples, Score

PAGE = "index.html"
SIDES = ("left", "right")
CHOICES = (*SIDES, "equal")
COLUMNS = ("page", "judge", "pair", "choice", "seconds")


@dataclass(frozen=True, slots=True)
class Question:
    """One pair of the page. Which method each side shows is in the key alone."""

    number: int
    prompt: str
    left: str
    right: str


def write_page(
    prepared: Prepared, methods: tuple[str, str], out: Path, seed: int, num_pairs: int = 0
) -> Path:
    """Write page and videos into the folder `out`, and the key beside it; returns the key's path.

    num_pairs: how many, drawn from all prompts and seeds; 0 is all. Raises UserError for methods
    whose videos are not there, and if `out` exists.
    """
    key_file = out.with_name(f"{out.name}-key.json")
    for path in (out, key_file):
        if path.exists():
            raise UserError(f"{path} exists; choose another --out, or delete it")
    pairs = shared_pairs(prepared, methods)
    order = torch.randperm(len(pairs), generator=rng.generator(seed, "blind order")).tolist()
    chosen = [pairs[place] for place in order[: num_pairs or len(pairs)]]
    sides = torch.randint(2, (len(chosen),), generator=rng.generator(seed, "blind sides")).tolist()
    questions = []
    answers = []
    with atomic_folder(out) as folder:
        for number, (pair, turned) in enumerate(zip(chosen, sides, strict=True)):
            shown = pair[::-1] if turned else pair
            files = [f"{number:03d}-{side}.mp4" for side in SIDES]
            for cell, file in zip(shown, files, strict=True):
                copy_without_time(prepared.video(cell), folder / file)
            questions.append(Question(number, pair[0].prompt.text, *files))
            answers.append(answer(prepared, number, shown))
        page = page_id(questions, folder)
        (folder / PAGE).write_text(render(questions, page), encoding="utf-8")
        write_json(
            key_file, {"page": page, "methods": list(methods), "seed": seed, "pairs": answers}
        )
    return key_file


def shared_pairs(prepared: Prepared, methods: tuple[str, str]) -> list[tuple[Cell, Cell]]:
    """The videos of equal prompt and seed. UserError where one is missing."""
    for name in methods:
        if name not in prepared.protocol.methods:
            known = ", ".join(prepared.protocol.methods)
            raise UserError(f"there is no method {name}; use two of {known}")
        if name in prepared.not_run:
            raise UserError(f"{name} cannot be shown: {prepared.not_run[name]}")
    if methods[0] == methods[1]:
        raise UserError(f"both methods are {methods[0]}; name two")
    columns = [prepared.cells(name) for name in methods]
    absent = [cell for cells in columns for cell in cells if not prepared.video(cell).exists()]
    if absent:
        raise UserError(
            f"{len(absent)} videos are not there, such as {prepared.video(absent[0])}; run the "
            "protocol first"
        )
    return list(zip(*columns, strict=True))


def copy_without_time(source: Path, target: Path) -> None:
    """Copy a video; when it was made would say which method made it."""
    shutil.copyfile(source, target)
    os.utime(target, (0, 0))


def answer(prepared: Prepared, number: int, shown: tuple[Cell, ...]) -> dict[str, Any]:
    """A pair's entry in the key."""
    return {
        "pair": number,
        "prompt": shown[0].prompt.number,
        "seed": shown[0].seed,
        "methods": {side: cell.method for side, cell in zip(SIDES, shown, strict=True)},
        "sha256": {
            side: sha256_of(prepared.video(cell)) for side, cell in zip(SIDES, shown, strict=True)
        },
    }


def page_id(questions: Sequence[Question], folder: Path) -> str:
    """Names the page in its results: a hash of everything that it shows."""
    shown = [
        [each.prompt, sha256_of(folder / each.left), sha256_of(folder / each.right)]
        for each in questions
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


def render(questions: Sequence[Question], page: str) -> str:
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    content = [
        {"pair": each.number, "prompt": each.prompt, "left": each.left, "right": each.right}
        for each in questions
    ]
    return environment.get_template("blind.html").render(
        questions=content, page=page, columns=list(COLUMNS)
    )


@dataclass(frozen=True, slots=True)
class Preference:
    """How often the first of two methods was preferred.

    share: of pairs, an undecided one counts half, with its bootstrap interval over pairs. signs:
    pairs in which the second (lower) or the first (higher) got more votes. left: share of votes for
    the left side, which should be near a half. agreement: share of votes that agree with their
    pair's majority; NaN where no pair has two votes.
    """

    methods: tuple[str, str]
    share: Score
    signs: Signs
    votes: int
    judges: int
    unanswered: int
    left: float
    agreement: float


def count_votes(results: Sequence[Path], key_file: Path) -> Preference:
    """What people chose. Raises UserError for results of another page, and for damaged ones."""
    key = read_json(key_file)
    first, second = key["methods"]
    methods = {entry["pair"]: entry["methods"] for entry in key["pairs"]}
    votes = [vote for path in results for vote in read_votes(path, key["page"], methods)]
    refuse_second_votes(votes)
    if not votes:
        raise UserError(f"{', '.join(map(str, results))} hold no votes; answer a few pairs first")
    by_pair: dict[int, list[int]] = defaultdict(list)
    for vote in votes:
        chosen = methods[vote["pair"]].get(vote["choice"])
        by_pair[vote["pair"]].append((chosen == first) - (chosen == second))
    sums = [sum(each) for each in by_pair.values()]
    halves = torch.tensor([(value > 0) + 0.5 * (value == 0) for value in sums])
    every = Resamples.draw(len(sums), seed=0)
    sided = [vote["choice"] for vote in votes if vote["choice"] in SIDES]
    return Preference(
        (first, second),
        every.score(every.mean(halves), 0, 1),
        sign_test(sums),
        len(votes),
        len({vote["judge"] for vote in votes}),
        len(methods) - len(by_pair),
        sided.count("left") / len(sided) if sided else math.nan,
        agreement(list(by_pair.values())),
    )


def agreement(groups: Sequence[Sequence[int]]) -> float:
    """Share of votes that are those of their pair's majority, over pairs with two votes or more."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return math.nan
    most = sum(max(group.count(value) for value in set(group)) for group in several)
    return most / sum(len(group) for group in several)


def read_votes(path: Path, page: str, methods: dict[int, Any]) -> list[dict[str, Any]]:
    """The lines of one result file. A judge without a name is called as the file is."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); download it again") from error
    found = []
    for line, row in enumerate(rows, 2):
        lacking = [name for name in COLUMNS if row.get(name) is None]
        if lacking:
            raise UserError(f"{path}, line {line}: no {lacking[0]}; want {','.join(COLUMNS)}")
        if row["page"] != page:
            raise UserError(
                f"{path}, line {line}: is of page {row['page']}, the key is of {page}; use the key "
                "that was written with the page"
            )
        known = row["pair"].isdecimal() and int(row["pair"]) in methods
        if not known or row["choice"] not in CHOICES:
            raise UserError(
                f"{path}, line {line}: pair {row['pair']!r}, choice {row['choice']!r}; want a pair "
                f"of the page and {', '.join(CHOICES)}"
            )
        judge = row["judge"] or path.stem
        found.append(
            {"file": path, "judge": judge, "pair": int(row["pair"]), "choice": row["choice"]}
        )
    return found


def refuse_second_votes(votes: Sequence[dict[str, Any]]) -> None:
    """Raise UserError where a judge has voted twice on a pair, in one file or in two."""
    seen: dict[tuple[str, int], Path] = {}
    for vote in votes:
        name = (vote["judge"], vote["pair"])
        if name in seen:
            raise UserError(
                f"{vote['file']}: judge {name[0]!r} has voted on pair {name[1]} in {seen[name]} "
                "too; leave one out, or give the judges names of their own"
            )
        seen[name] = vote["file"]


def in_words(preference: Preference) -> str:
    """The result in sentences."""
    first, second = preference.methods
    share = preference.share
    signs = preference.signs
    lines = [
        f"{first} is preferred to {second} in {100 * share.value:.0f} % of {share.n} pairs "
        f"[{100 * share.low:.0f}, {100 * share.high:.0f}]",
        f"{signs.higher} pairs for {first}, {signs.lower} for {second}, {signs.ties} undecided; "
        f"sign test p = {signs.p:.2g}",
        f"{preference.votes} votes of {preference.judges} judges; "
        f"{preference.unanswered} pairs without a vote",
        f"the left side was chosen in {100 * preference.left:.0f} % of decided votes",
    ]
    if preference.agreement == preference.agreement:
        lines.append(
            f"{100 * preference.agreement:.0f} % of votes agree with their pair's majority"
        )
    return "\n".join(lines)
