"""From picks to a set: the quota, what leaks, what is held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate.assemble import PackSettings, TrainingSet, assemble
from selfforcing_dfd.curate.candidates import Candidate
from selfforcing_dfd.curate.choose import Limits, choose
from selfforcing_dfd.curate.folder import Clusters, Embedded
from selfforcing_dfd.curate.leakage import Gate, Leak, words_of
from selfforcing_dfd.curate.picks import Sheet
from selfforcing_dfd.data.sources.listing import chosen_clips, list_clips

ANGLES = (-0.1, 0.2, 0.4, 0.65, 0.8, 1.0, 0.41, 2.0, 2.2, 2.4)
LABELS = (0, 0, 0, 0, 0, 0, 0, 1, 1, 1)


def on_a_circle() -> tuple[Embedded, Clusters, list[Sheet]]:
    """Ten clips at known angles: seven in one cluster, of which 6 copies 2, three in another."""
    vectors = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
    names = [f"{number}.mp4" for number in range(len(ANGLES))]
    embedded = Embedded(Path("."), {"sha256": ""}, names, {}, vectors)
    labels = np.array(LABELS)
    clusters = Clusters({"sha256": ""}, labels, np.array(ANGLES), np.zeros((2, 2)))
    sheets = []
    for cluster in (0, 1):
        rows = np.flatnonzero(labels == cluster).tolist()
        shown = tuple(Candidate(n, row, names[row], 0.1) for n, row in enumerate(rows))
        sheets.append(Sheet(cluster, len(rows), 0.5, shown))
    return embedded, clusters, sheets


def rows(picks: dict[int, list[int]], **options: object) -> list[int]:
    limits = Limits(**options)  # type: ignore[arg-type]
    return [one.row for one in choose(*on_a_circle(), picks, limits)]


def test_each_pick_brings_what_is_most_like_it() -> None:
    """Catches a quota filled from one end, clips that come twice, and copies of a taken clip."""
    assert rows({0: [2], 1: [0]}) == [2, 7]
    assert rows({0: [2], 1: [0]}, quota=4, duplicate=0.9999) == [2, 1, 7, 8]
    assert rows({0: [2], 1: [0]}, quota=4, duplicate=1.1) == [2, 6, 7, 8]
    assert rows({0: [2, 5]}, quota=5, duplicate=0.9999) == [2, 5, 1, 4, 3]
    assert rows({0: [2], 1: [0]}, quota=8, duplicate=0.9999) == [2, 1, 3, 4, 0, 7, 8, 9]
    assert rows({0: [2], 1: [0]}, quota=4, duplicate=0.9999, excluded={1, 8}) == [2, 3, 7, 9]
    assert rows({0: [2], 1: [0]}, quota=2, duplicate=0.9999, excluded={2}) == [7, 8]


def test_a_quota_that_cannot_be_met_is_named() -> None:
    """Catches a set that is smaller, or larger, than what was asked for, without a word."""
    with pytest.raises(UserError, match="--quota is 9 and the picked clusters hold 6 clips"):
        rows({0: [2]}, quota=9, duplicate=0.9999)
    with pytest.raises(UserError, match="the picks are 3 clips and --quota is 2; pick fewer"):
        rows({0: [0, 1, 2]}, quota=2)


PROMPT = "A small dog runs over the wet grass of a park, in the morning."
LONG = (
    "The camera follows a small dog that runs over the wet grass of a park, in the morning light, "
    "while people walk by and a train is heard from far away behind the trees."
)


@pytest.mark.parametrize(
    ("caption", "how"),
    [
        (PROMPT, "equal"),
        ("a SMALL dog runs over the wet grass of a park in the morning", "equal"),
        ("A small dog runs over the wet grass of a park, in the evening.", "near"),
        (f"{LONG} {PROMPT} The end.", "contained"),
        ("a small dog runs over the wet grass", "contained"),
        ("A big dog sleeps.", ""),
        ("A small cat runs over the dry grass of a garden in the evening.", ""),
        (LONG, ""),
        ("", ""),
    ],
)
def test_captions_that_leak_a_prompt_are_found(caption: str, how: str) -> None:
    """Catches an evaluation on what was trained on, and a gate that stops half of the data."""
    gate = Gate(["Something else entirely.", PROMPT], 0.6)
    assert gate.leak(caption) == (Leak(PROMPT, how) if how else None)


def test_words_are_those_of_any_script() -> None:
    """Catches Chinese prompts that count as one word, and letters in two codings."""
    assert words_of("\uff21 Café，2 dogs!") == ("a", "café", "2", "dogs")
    assert words_of("一只小狗 runs") == ("一", "只", "小", "狗", "runs")
    gate = Gate(["一只小狗在公园的草地上奔跑"], 0.6)
    assert gate.leak("一只小狗在公园的草地上奔跑。") is not None
    assert gate.leak("一只小狗在公园的草地上跳跃") is not None
    assert gate.leak("两只大猫在房间里睡觉") is None


def assembled(
    curation: Embedded,
    settings: PackSettings,
    prompts: tuple[str, ...] = (),
    held_out: tuple[str, ...] = (),
) -> TrainingSet:
    intake = curation.intake
    listed = list_clips(intake.source, levels=("short", "medium", "long"))
    clips = chosen_clips(listed, curation.names)
    return assemble(curation, clips, settings, prompts, held_out)


def test_a_set_is_a_function_of_picks_and_gates(curation: Embedded) -> None:
    """Catches a pick that leaks, a held-out clip that comes in as a neighbour, and no record."""
    settings = PackSettings(quota=14, duplicate=1.0)
    before = assembled(curation, settings)
    assert len(before.names) == len(set(before.names)) == 14
    assert before.num_picked == sum(map(len, before.record["picks"].values())) > 8
    assert [one.row for one in before.chosen] == sorted(one.row for one in before.chosen)
    assert assembled(curation, settings).record == before.record
    assert before.reasons == {"problem": 1}
    picked = before.names[0]
    listed = list_clips(curation.intake.source, levels=("long",))
    prompt = next(clip.caption for clip in listed if clip.name == picked)
    leaking = assembled(curation, settings, prompts=(prompt,))
    assert [one.clip for one in leaking.dropped] == [picked]
    assert leaking.dropped[0].why == f"equal to an evaluation prompt: {prompt}"
    assert picked not in leaking.names
    kept_out = assembled(curation, replace(settings, held_out=1.1), held_out=(picked,))
    assert picked not in kept_out.names
    assert kept_out.reasons["held out"] == 1
    alike = assembled(curation, PackSettings(held_out=0.75), held_out=(picked,))
    vectors = curation.features
    cosines = vectors @ vectors[list(curation.names).index(picked)]
    assert alike.reasons["held out"] == (cosines >= 0.75).sum() > 1
    with pytest.raises(UserError, match=r"none\.mp4 is held out and is none of the clips"):
        assembled(curation, settings, held_out=("none.mp4",))


def test_a_set_of_nothing_is_named(curation: Embedded) -> None:
    """Catches a folder of no shards where every pick leaks."""
    listed = list_clips(curation.intake.source, levels=("long",))
    prompts = tuple(clip.caption for clip in listed if clip.caption)
    with pytest.raises(UserError, match="no pick may be in the set"):
        assembled(curation, PackSettings(), prompts)
