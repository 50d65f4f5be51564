"""The blind page: random sides from a seed, nothing that gives them away, votes read back."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import EXIT_USER_ERROR, UserError, sha256_of
from selfforcing_dfd.protocol.blind import count_votes, in_words, write_page
from selfforcing_dfd.protocol.prepared import prepare


@pytest.fixture
def page(finished: tuple[Path, str], tmp_path: Path) -> tuple[Path, Path]:
    """(folder of the page, key)."""
    prepared = prepare(str(finished[0]))
    key = write_page(prepared, ("one", "two"), tmp_path / "page", seed=3)
    return tmp_path / "page", key


def test_the_key_says_which_side_shows_which_video(
    finished: tuple[Path, str], page: tuple[Path, Path]
):
    """Catches a key that is turned round, which turns the result round."""
    prepared = prepare(str(finished[0]))
    folder, key = page
    content = json.loads(key.read_text())
    cells = {(cell.method, *cell.key): cell for m in ("one", "two") for cell in prepared.cells(m)}
    seen = set()
    for entry in content["pairs"]:
        for side, method in entry["methods"].items():
            cell = cells[method, entry["prompt"], entry["seed"]]
            shown = folder / f"{entry['pair']:03d}-{side}.mp4"
            assert sha256_of(shown) == sha256_of(prepared.video(cell)) == entry["sha256"][side]
            seen.add(cell)
    assert seen == set(cells.values())
    assert content["seed"] == 3


def test_the_page_gives_nothing_away(page: tuple[Path, Path]):
    """Catches a method's name, a seed or a time of making in what people are given."""
    folder, key = page
    assert key.parent != folder
    text = (folder / "index.html").read_text()
    shown = {path.name for path in folder.iterdir()}
    assert shown == {"index.html"} | {
        f"{n:03d}-{s}.mp4" for n in range(6) for s in ("left", "right")
    }
    for word in ("one", "two", "key", "seed"):
        assert not re.search(rf'"{word}"', text)
    assert len({path.stat().st_mtime for path in folder.glob("*.mp4")}) == 1
    assert not re.findall(r'(?:src|href)="https?:', text)
    questions = json.loads(re.search(r"const questions = (.*);", text).group(1))  # type: ignore[union-attr]
    assert sorted(questions[0]) == ["left", "pair", "prompt", "right"]


def test_sides_and_order_are_random_and_a_function_of_the_seed(
    finished: tuple[Path, str], tmp_path: Path
):
    """Catches a first method that is always on the left, and a page that cannot be made again."""
    prepared = prepare(str(finished[0]))
    found = []
    for number, seed in enumerate((0, 0, 1, 2, 3)):
        key = write_page(prepared, ("one", "two"), tmp_path / str(number), seed)
        pairs = json.loads(key.read_text())["pairs"]
        found.append([(each["prompt"], each["seed"], each["methods"]["left"]) for each in pairs])
    assert found[0] == found[1]
    assert len({tuple(each) for each in found}) == 4
    left = [method for pairs in found[1:] for *_, method in pairs]
    assert 4 < left.count("one") < 20
    key = write_page(prepared, ("one", "two"), tmp_path / "few", 0, num_pairs=2)
    assert [entry["pair"] for entry in json.loads(key.read_text())["pairs"]] == [0, 1]


def results(path: Path, key: Path, wins: dict[int, str], judge: str = "a", page: str = "") -> Path:
    """A file as the page writes it. wins: pair -> the method that was chosen, or equal."""
    content = json.loads(key.read_text())
    lines = ["page,judge,pair,choice,seconds"]
    for entry in content["pairs"]:
        if entry["pair"] in wins:
            sides = {method: side for side, method in entry["methods"].items()}
            choice = sides.get(wins[entry["pair"]], wins[entry["pair"]])
            row = [page or content["page"], judge, entry["pair"], choice, 1.5]
            lines.append(",".join(f'"{each}"' for each in row))
    path.write_text("\r\n".join(lines) + "\r\n")
    return path


def test_votes_are_counted_by_method(page: tuple[Path, Path], tmp_path: Path):
    """Catches a preference for a side in place of a method, and ties that count for one."""
    _, key = page
    wins = {0: "two", 1: "two", 2: "two", 3: "one", 4: "equal"}
    found = count_votes([results(tmp_path / "a.csv", key, wins)], key)
    assert found.methods == ("one", "two")
    assert found.share.value == pytest.approx(1.5 / 5)
    assert (found.signs.higher, found.signs.lower, found.signs.ties) == (1, 3, 1)
    assert found.signs.p == pytest.approx(10 / 16), "1 of 4, both sides"
    assert (found.votes, found.judges, found.unanswered) == (5, 1, 1)
    assert math.isnan(found.agreement)


def test_several_judges_count_by_pair(page: tuple[Path, Path], tmp_path: Path):
    """Catches votes on one pair that count as if they were independent."""
    _, key = page
    first = results(tmp_path / "a.csv", key, dict.fromkeys(range(6), "one"), "a")
    second = results(tmp_path / "b.csv", key, dict.fromkeys(range(6), "one"), "b")
    third = results(tmp_path / "c.csv", key, dict.fromkeys(range(6), "two"), "c")
    found = count_votes([first, second, third], key)
    assert found.signs.p == pytest.approx(2 / 2**6), "six pairs, not eighteen votes"
    assert (found.votes, found.judges) == (18, 3)
    assert found.agreement == pytest.approx(2 / 3)
    assert "one is preferred to two in 100 % of 6 pairs" in in_words(found)


def test_wrong_results_are_refused(page: tuple[Path, Path], tmp_path: Path):
    """Catches votes on another page, and votes that are counted twice."""
    _, key = page
    good = results(tmp_path / "a.csv", key, {0: "one"})
    again = results(tmp_path / "b.csv", key, {0: "one"})
    with pytest.raises(UserError, match="is of page other, the key is of"):
        count_votes([results(tmp_path / "c.csv", key, {0: "one"}, page="other")], key)
    for was, now, message in (
        ('"0"', '"17"', "pair '17'"),
        ("left", "up", "choice 'up'"),
        ("right", "up", "choice 'up'"),
        (",seconds", "", "no seconds"),
    ):
        text = good.read_text()
        if was in text:
            (tmp_path / "d.csv").write_text(text.replace(was, now))
            with pytest.raises(UserError, match=message):
                count_votes([tmp_path / "d.csv"], key)
    with pytest.raises(UserError, match=r"judge 'a' has voted on pair 0 in .*a\.csv too"):
        count_votes([good, again], key)
    with pytest.raises(UserError, match="hold no votes"):
        count_votes([results(tmp_path / "e.csv", key, {})], key)


def test_the_commands_write_and_read(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Catches a command that asks for something else than it says."""
    plan, _ = finished
    out = tmp_path / "page"
    command = ["blind", "page", str(plan), "two", "one", "--out", str(out), "--seed", "1"]
    assert main(command) == 0
    assert "keep this to yourself" in capsys.readouterr().out
    key = tmp_path / "page-key.json"
    votes = results(tmp_path / "v.csv", key, dict.fromkeys(range(6), "two"))
    assert main(["blind", "count", str(votes), "--key", str(key)]) == 0
    assert "two is preferred to one in 100 % of 6 pairs" in capsys.readouterr().out
    for wrong, message in (
        (command, "page exists"),
        (["blind", "page", str(plan), "one", "one", "--out", "x"], "name two"),
        (["blind", "page", str(plan), "one", "nobody", "--out", "x"], "no method nobody"),
        (["blind", "page", str(plan), "one", "absent", "--out", "x"], "no weights at"),
        (["blind", "count", str(votes), "--key", "nowhere.json"], "does not exist"),
        (["blind", "page"], "the following arguments are required"),
    ):
        assert main(wrong) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
