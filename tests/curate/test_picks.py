"""Contact sheets, candidates, picks by a rule and by a person, and FiftyOne's layout."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_processes import run_until_killed
from PIL import Image

from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate import pick
from selfforcing_dfd.curate.candidates import Candidate, Shown, even_ranks, measured, pick_by_rule
from selfforcing_dfd.curate.cluster import ClusterSettings, cluster_clips
from selfforcing_dfd.curate.fiftyone import write_dataset
from selfforcing_dfd.curate.folder import CANDIDATES, PICKS, SHEETS, Embedded, read_clusters
from selfforcing_dfd.curate.pick import PickSettings, read_sheets, show_clusters
from selfforcing_dfd.curate.picks import Sheet, read_picks, write_picks
from selfforcing_dfd.curate.sheets import GAP, HEIGHT, MARGIN, TITLE, draw_sheet
from selfforcing_dfd.processes.engine import in_processes
from selfforcing_dfd.rng import normal

SETTINGS = PickSettings(candidates=5, pictures=2, picks=3)


def good(number: int, **changes: Any) -> Candidate:
    fields = {"light": 0.5, "motion": 2.0, "jump": 1.0, "sharpness": 3.0, **changes}
    return Candidate(number, number, f"{number}.mp4", 0.1 * number, **fields)


def sheet_of(number: int, count: int = 10) -> Sheet:
    return Sheet(number, 30 + number, 0.5, tuple(good(n) for n in range(count)))


def contents(folder: Path) -> dict[str, bytes]:
    files = [folder / CANDIDATES, folder / PICKS, *sorted((folder / SHEETS).iterdir())]
    return {path.name: path.read_bytes() for path in files}


def test_candidates_are_at_even_ranks() -> None:
    """Catches candidates from the middle alone, and a rank that comes twice in a small cluster."""
    assert even_ranks(5, 40) == [0, 1, 2, 3, 4]
    assert even_ranks(1, 40) == [0]
    assert even_ranks(79, 40) == list(range(0, 79, 2))
    ranks = even_ranks(966, 40)
    assert (len(ranks), ranks[0], ranks[-1]) == (40, 0, 965)


def test_sheets_show_each_candidate_in_its_place(made: Path) -> None:
    """Catches a number beside another clip's pictures: the reviewer would pick the wrong clips."""
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    shown = []
    for number, colour in enumerate(colours):
        pictures = torch.zeros(2, 30, 60, 3, dtype=torch.uint8)
        pictures[0] = torch.tensor(colour)
        shown.append(Shown(good(number), pictures))
    shown[1] = Shown(good(1, problem="is damaged"), None)
    sheet = np.asarray(draw_sheet("title", shown, 2))
    width = 2 * HEIGHT
    column = MARGIN + 2 * (width + GAP) + GAP
    below = TITLE + GAP + HEIGHT + GAP
    middle = HEIGHT // 2
    assert sheet.shape[1] == 2 * column
    assert tuple(sheet[TITLE + GAP + middle, MARGIN + width // 2]) == colours[0]
    assert tuple(sheet[TITLE + GAP + middle, MARGIN + width + GAP + width // 2]) == (0, 0, 0)
    assert tuple(sheet[below + middle, MARGIN + width // 2]) == (255, 255, 255)
    assert tuple(sheet[TITLE + GAP + middle, column + MARGIN + width // 2]) == colours[2]
    numbers = sheet[:, : MARGIN - GAP]
    assert (numbers[TITLE : below - GAP] < 100).any()
    assert (numbers[below:] < 100).any()
    written = Image.open(made / SHEETS / "cluster_0000.jpg")
    assert written.format == "JPEG"


def test_candidates_go_from_the_centre_outwards(made: Path, curation: Embedded) -> None:
    """Catches candidates of another cluster, and numbers that do not fit the features."""
    clusters = read_clusters(curation)
    sheets = read_sheets(made, clusters)
    assert [sheet.cluster for sheet in sheets] == [0, 1, 2, 3]
    assert sum(sheet.size for sheet in sheets) == 24
    for sheet in sheets:
        rows = [one.row for one in sheet.candidates]
        assert (clusters.labels[rows] == sheet.cluster).all()
        assert [curation.names[row] for row in rows] == [one.clip for one in sheet.candidates]
        distances = [one.distance for one in sheet.candidates]
        assert distances == sorted(distances)
        assert [one.number for one in sheet.candidates] == list(range(len(rows)))
        assert all(one.motion > 0 and one.light > 0.2 for one in sheet.candidates)


def test_faults_are_seen() -> None:
    """Catches a black, frozen or cut clip that the rule picks for being so different."""
    noise = (20 * normal((6, 8, 8, 3), 0, "noise")).clamp(-60, 60)
    moving = (128 + noise).to(torch.uint8)
    still = moving[:1].expand(6, 8, 8, 3)
    other = (60 + noise).to(torch.uint8)
    cut = torch.cat(
        [still[:3] + torch.arange(3, dtype=torch.uint8)[:, None, None, None], other[:1]]
    )
    cut = torch.cat([cut, cut[3:] + 1, cut[3:] + 2])
    clips = {"": moving, "dark": moving // 40, "frozen": still, "cut": cut}
    for fault, clip in clips.items():
        assert Candidate(0, 0, "a.mp4", 0.1, **measured(clip)).fault == fault
    assert measured(moving)["light"] == pytest.approx(0.5, abs=0.02)
    assert measured(still)["motion"] == 0


def test_the_rule_picks_what_differs() -> None:
    """Catches picks that are copies of each other, and faulty or blurred clips among them."""
    angles = np.array([0.0, 0.01, 1.2, 2.0, 3.0, 0.5])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    candidates = [good(n) for n in range(6)]
    assert pick_by_rule(candidates, vectors, 3, 0.98) == [0, 2, 4]
    assert pick_by_rule(candidates, vectors, 6, 0.98) == [0, 2, 3, 4, 5]
    candidates[4] = good(4, motion=0.0)
    assert pick_by_rule(candidates, vectors, 3, 0.98) == [0, 2, 3]
    candidates[0] = good(0, sharpness=0.5)
    assert pick_by_rule(candidates, vectors, 2, 0.98) == [1, 3]
    assert pick_by_rule([good(0, light=0.0)], vectors[:1], 2, 0.98) == []


def test_picks_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Catches a table that is not its own reader's, and spreadsheets' habits."""
    sheets = [sheet_of(0), sheet_of(1), sheet_of(2)]
    path = tmp_path / PICKS
    write_picks(path, sheets, {0: [1, 3], 2: [9]})
    assert read_picks(path, sheets) == {0: [1, 3], 2: [9]}
    assert path.read_text().splitlines()[1] == '0,30,0.5000,0,0,0,"1,3",'
    text = path.read_text().replace("\n", "\r\n").replace('"1,3"', '" 1, 3 "')
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b",,,,,,,\r\n")
    assert read_picks(path, sheets) == {0: [1, 3], 2: [9]}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"1,3"', "13", "line 2: picks has 13; cluster 0 has 0 to 9"),
        ('"1,3"', '"1,x"', "line 2: picks has 'x', want numbers such as 0,3,17"),
        ('"1,3"', '"1,,3"', "line 2: picks has '', want numbers"),
        ('"1,3"', '"1,-3"', "line 2: picks has '-3', want numbers"),
        ('"1,3"', '"3,3"', "line 2: picks has 3 twice"),
        ('"1,3"', '"3,1"', "line 2: picks has 1 after 3; want ascending"),
        ('"1,3"', "1,3", 'line 2: got 9 columns, want 8; put picks in quotes, such as "0,3,17"'),
        ('"1,3"', '"1,3', "line 4 is no CSV"),
        ('"1,3"', '"1,8"', "line 2: picks has 8, which cannot be read"),
        ("\n1,31", "\n0,30", "line 3: cluster 0 has a line already, 2"),
        ("\n1,31", "\n7,31", "line 3: there is no cluster 7; want 0 to 2"),
        ("\n1,31", "\n1,99", "line 3: cluster 1 has 31 clips and not 99"),
        ("\n1,31", "\none,31", "line 3: cluster has 'one', want a whole number"),
        ("\n1,31,0.5000,0,0,0,,", "", "cluster 1 has no line; to drop a cluster leave"),
        ("picks,notes", "pick,notes", "line 1: got the columns cluster, size"),
        ("picks,notes", "picks,picks", "line 1 names a column twice"),
    ],
)
def test_a_slip_in_the_table_is_named(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    """Catches a slip of a reviewer that silently changes the training data."""
    broken = [good(n, problem="is damaged" if n == 8 else "") for n in range(10)]
    sheets = [Sheet(0, 30, 0.5, tuple(broken)), sheet_of(1), sheet_of(2)]
    path = tmp_path / PICKS
    write_picks(path, sheets, {0: [1, 3], 2: [9]})
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(UserError) as raised:
        read_picks(path, sheets)
    assert message in str(raised.value)


def test_a_table_without_picks_is_named(tmp_path: Path) -> None:
    """Catches an empty training set, and a table in an editor's own letters."""
    path = tmp_path / PICKS
    with pytest.raises(UserError, match="no such file; selfforcing-dfd curate pick writes it"):
        read_picks(path, [sheet_of(0)])
    write_picks(path, [sheet_of(0)], {})
    with pytest.raises(UserError, match="nothing is picked; write numbers"):
        read_picks(path, [sheet_of(0)])
    path.write_bytes("cluster,notes\n0,é".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_picks(path, [sheet_of(0)])


def show_until_killed(embedded: Embedded, num_sheets: int) -> None:
    whole = pick.write_sheet

    def dying(*args: Any) -> None:
        whole(*args)
        if len(list((embedded.folder / SHEETS).iterdir())) == num_sheets:
            os.kill(os.getpid(), signal.SIGKILL)

    pick.write_sheet = dying
    show_clusters(embedded, read_clusters(embedded), SETTINGS)


def test_a_killed_run_goes_on_and_processes_change_nothing(curation: Embedded) -> None:
    """Catches sheets that are missing or of two kinds after kill -9, and a person's lost work."""
    folder = curation.folder
    before = contents(folder)
    clusters = read_clusters(curation)
    with pytest.raises(UserError, match="may hold somebody's picks; replace it with --overwrite"):
        show_clusters(curation, clusters, SETTINGS)
    for path in (folder / CANDIDATES, folder / PICKS, *(folder / SHEETS).iterdir()):
        path.unlink()
    run_until_killed(show_until_killed, curation, 3)
    assert len((folder / f"{CANDIDATES}.partial").read_text().splitlines()) == 3
    show_clusters(curation, clusters, SETTINGS, engine=in_processes(2, "fork"))
    assert contents(folder) == before
    assert not (folder / f"{CANDIDATES}.partial").exists()


def test_sheets_of_other_clusters_are_refused(curation: Embedded) -> None:
    """Catches picks that are read with clusters made since, whose numbers mean other clips."""
    folder = curation.folder
    clusters = cluster_clips(curation, ClusterSettings(clusters=5), overwrite=True)
    with pytest.raises(UserError, match=r"belongs to other clusters; run .* pick again"):
        read_sheets(folder, clusters)
    (folder / CANDIDATES).write_text("{}\n")
    with pytest.raises(UserError, match="is not as it was written"):
        read_sheets(folder, clusters)
    (folder / CANDIDATES).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_sheets(folder, clusters)
    (folder / CANDIDATES).unlink()
    with pytest.raises(UserError, match="run selfforcing-dfd curate pick first"):
        read_sheets(folder, clusters)


def test_fiftyone_finds_its_layout(curation: Embedded, tmp_path: Path) -> None:
    """Catches paths that lead nowhere from the dataset's folder, and unreadable clips in it."""
    sheets = read_sheets(curation.folder, read_clusters(curation))
    folder = tmp_path / "fiftyone"
    write_dataset(folder, curation, sheets, {0: [0, 2]})
    about = json.loads((folder / "metadata.json").read_text())
    assert about["media_type"] == "video"
    assert "version" not in about
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert len(samples) == sum(len(sheet.candidates) for sheet in sheets)
    assert [sample["candidate"] for sample in samples if sample["tags"] == ["picked"]] == [0, 2]
    for sample in samples:
        assert (folder / sample["filepath"]).is_file()
        assert json.loads((folder / sample["frames"]).read_text()) == {"frames": {}}
        assert Path(sample["filepath"]).name == sample["clip"]
