"""Captions for a folder of clips: through HTTP, by template, resumed, and packed."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import write_clip
from in_processes import run_until_killed
from PIL import Image

from selfforcing_dfd.cli.main import STEPS, main, parser_of
from selfforcing_dfd.common import UserError
from selfforcing_dfd.curate.caption import CaptionSummary, caption_clips
from selfforcing_dfd.curate.captioners import HttpCaptioner, Reply, TinyCaptioner
from selfforcing_dfd.curate.intake import Intake, Looks
from selfforcing_dfd.curate.progress import ProgressFile
from selfforcing_dfd.data.shards import ShardReader
from selfforcing_dfd.data.sources.listing import Clip
from selfforcing_dfd.processes.engine import in_processes
from selfforcing_dfd.tiny import world

NUM = 6
LOOKS = Looks(9, Fraction(16))
REPLY = "[SHORT] Clip {0}.\n[MEDIUM] It is clip {0}.\n[LONG] This is clip {0} of many."


@dataclass
class Server:
    """A server of OpenAI's chat completions that answers with canned replies."""

    url: str = ""
    replies: list[Any] = field(default_factory=list)  # texts, or HTTP errors; the last repeats
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def next(self) -> Any:
        return self.replies[min(len(self.requests), len(self.replies)) - 1]


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            served.requests.append(json.loads(body) | {"path": self.path})
            served.headers.append(dict(self.headers))
            reply = served.next()
            if isinstance(reply, int):
                self.send_error(reply)
                return
            choice = {"message": {"content": reply}, "finish_reason": "stop"}
            answer = (
                reply if isinstance(reply, bytes) else json.dumps({"choices": [choice]}).encode()
            )
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is printed."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = Thread(target=http.serve_forever)
    thread.start()
    yield served
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curate") / "clips"
    world.write_clips(folder, NUM, 0, "all", 9)
    return folder


def listed_in(folder: Path) -> list[Clip]:
    return Intake(folder, 9, Fraction(16)).clips()


def rows_of(table: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in table.read_text().splitlines()]


def captioner(server: Server, **changes: Any) -> HttpCaptioner:
    return HttpCaptioner(server.url, "vlm", **{"num_pictures": 3, "wait_s": 0.01, **changes})


def test_a_server_is_asked_once_for_each_clip(
    server: Server, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches three passes in place of one, frames in no order, and requests it cannot read."""
    monkeypatch.setenv("OPENAI_API_KEY", "for-tests")
    server.replies = [REPLY.format(7)]
    listed = listed_in(clips)
    summary = caption_clips(listed, captioner(server), tmp_path / "a.jsonl", LOOKS, num_workers=1)
    assert (summary.num_captioned, summary.left_out) == (NUM, ())
    assert summary.made_up == {"short": 0, "medium": 0, "long": 0}
    assert [row["video"] for row in rows_of(summary.table)] == [clip.name for clip in listed]
    assert rows_of(summary.table)[3]["medium"] == "It is clip 7."
    assert len(server.requests) == NUM
    first = server.requests[0]
    assert first["path"] == "/v1/chat/completions"
    assert first["model"] == "vlm"
    system, user = first["messages"]
    assert "[SHORT]" in system["content"]
    pictures = [part["image_url"]["url"] for part in user["content"] if "image_url" in part]
    assert len(pictures) == 3
    head, _, data = pictures[0].partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
    assert len({request["seed"] for request in server.requests}) == NUM
    assert server.headers[0]["Authorization"] == "Bearer for-tests"


def test_a_server_that_is_busy_is_asked_again(server: Server, clips: Path, tmp_path: Path) -> None:
    """Catches a night's work that ends with the first 503."""
    server.replies = [503, 429, b"no json", REPLY.format(1)]
    listed = listed_in(clips)[:2]
    summary = caption_clips(listed, captioner(server), tmp_path / "a.jsonl", LOOKS, num_workers=1)
    assert summary.num_captioned == 2
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("reply", "asked", "message"),
    [
        (404, 1, "chat/completions: 404 Not Found"),
        (500, 2, "500 Internal Server Error"),
        (b"[]", 1, "want a chat completion with choices"),
        (b'{"choices": []}', 1, "want a chat completion with choices"),
    ],
)
def test_a_server_that_does_not_answer_is_named(
    server: Server, clips: Path, tmp_path: Path, reply: Any, asked: int, message: str
) -> None:
    """Catches a wrong model's name that empties the whole table, and work that is thrown away."""
    server.replies = [REPLY.format(1), reply]
    out = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match=message):
        caption_clips(listed_in(clips), captioner(server, tries=2), out, LOOKS, num_workers=0)
    assert len(server.requests) == 1 + asked
    assert not out.exists()
    server.replies = [REPLY.format(2)]
    caption_clips(listed_in(clips), captioner(server), out, LOOKS, num_workers=0)
    assert [row["short"] for row in rows_of(out)] == ["Clip 1.", *["Clip 2."] * (NUM - 1)]


def test_nobody_at_the_address_is_named(clips: Path, tmp_path: Path) -> None:
    """Catches a traceback where the server was not started."""
    nobody = HttpCaptioner("http://127.0.0.1:9/v1", "vlm", tries=1)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1/chat/completions: .*refused"):
        caption_clips(listed_in(clips), nobody, tmp_path / "a.jsonl", LOOKS)
    with pytest.raises(UserError, match="want the address of a server"):
        HttpCaptioner("localhost:8000", "vlm")


def test_what_the_model_did_not_write_is_counted(
    server: Server, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches made-up captions that nobody hears of, and clips about which nothing was written."""
    server.replies = ["[LONG] One. Two.", "", "", REPLY.format(3)]
    out = tmp_path / "a.jsonl"
    command = ["curate", "caption", str(clips), "--url", server.url, "--model", "vlm"]
    options = ["--frames", "9", "--pictures", "1", "--workers", "1", "--out", str(out)]
    assert main([*command, *options]) == 0
    said = capsys.readouterr()
    assert "6 offered = 5 captioned + 1 left out" in said.out
    assert "left out 000001.mp4: vlm wrote nothing about it" in said.out
    assert "made up from another length: short 20.0%, medium 20.0%, long 0.0%" in said.out
    assert "more than 5% of a length were not written by the model" in said.err
    assert rows_of(out)[0]["made_up"] == "short medium"


class Counting:
    """Writes captions without a server; it can kill its process at one clip."""

    name = "counting"
    num_pictures = 1

    def __init__(self, killed_at: int = -1) -> None:
        self.killed_at = killed_at
        self.asked = 0

    def describe(self, pictures: Sequence[np.ndarray], seed: int) -> Reply:
        if self.asked == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked += 1
        return Reply(REPLY.format(seed))


def test_a_killed_run_goes_on_where_it_was(clips: Path, tmp_path: Path) -> None:
    """Catches clips that are described twice or never after kill -9, and half a line."""
    listed = listed_in(clips)
    whole = tmp_path / "whole.jsonl"
    caption_clips(listed, Counting(), whole, LOOKS, num_workers=0)
    out = tmp_path / "a.jsonl"
    unfinished = tmp_path / "a.jsonl.partial"
    for asked, lines in ((3, 4), (2, 5)):
        describe = partial(caption_clips, num_workers=0)
        run_until_killed(describe, listed, Counting(asked), out, LOOKS)
        assert len(unfinished.read_text().splitlines()) == lines
        unfinished.write_bytes(unfinished.read_bytes()[:-9])
    with pytest.raises(UserError, match="other settings or clips: longest was 512, is 64"):
        caption_clips(listed, Counting(), out, Looks(9, Fraction(16), 64))
    again = Counting()
    caption_clips(listed, again, out, LOOKS, num_workers=2)
    assert again.asked == NUM - 3
    assert out.read_bytes() == whole.read_bytes()
    assert not unfinished.exists()
    with pytest.raises(UserError, match=r"a\.jsonl exists; .*--overwrite"):
        caption_clips(listed, again, out, LOOKS)


def described_until_killed(clips: list[Clip], out: Path, lines: int) -> None:
    """In two processes more, until so many captions are on disk."""
    whole = ProgressFile.add

    def dying(self: ProgressFile, line: dict[str, Any]) -> None:
        whole(self, line)
        if len(self.done) == lines:
            os.kill(os.getpid(), signal.SIGKILL)

    ProgressFile.add = dying  # type: ignore[method-assign,assignment]
    caption_clips(clips, Counting(), out, LOOKS, num_workers=1, engine=in_processes(2, "fork"))


def test_windows_are_captioned_alike_in_any_number_of_processes(tmp_path: Path) -> None:
    """Catches windows of a film with each other's captions, and captions that a kill doubles."""
    films = tmp_path / "films"
    films.mkdir()
    for film in range(2):
        parts = [
            world.render(world.clip_number(5 * film + part, 0, "long")[0], 9)[0]
            for part in range(5)
        ]
        write_clip(films / f"{film}.mp4", (255 * torch.cat(parts)).round().to(torch.uint8))
    listed = Intake(films, 9, Fraction(16), cut="windows").clips()
    wanted = [world.clip_number(number, 0, "long")[1] for number in range(10)]
    tables = []
    for number in (1, 2, 3):
        out = tmp_path / f"{number}.jsonl"
        engine = in_processes(number, "fork")
        caption_clips(listed, TinyCaptioner(), out, LOOKS, num_workers=1, engine=engine)
        assert [row["long"] for row in rows_of(out)] == wanted
        tables.append(out.read_bytes())
    assert len(set(tables)) == 1
    whole = tmp_path / "whole.jsonl"
    caption_clips(listed, Counting(), whole, LOOKS, num_workers=0)
    killed = tmp_path / "killed.jsonl"
    for lines in (3, 7):
        run_until_killed(described_until_killed, listed, killed, lines)
        assert not killed.exists()
        assert len((tmp_path / "killed.jsonl.partial").read_text().splitlines()) == 1 + lines
    engine = in_processes(2, "fork")
    caption_clips(listed, Counting(), killed, LOOKS, num_workers=2, engine=engine)
    assert killed.read_bytes() == whole.read_bytes()


def test_clips_that_cannot_be_seen_are_left_out_by_name(clips: Path, tmp_path: Path) -> None:
    """Catches a damaged file that ends the run, and a short one that is described for nothing."""
    (tmp_path / "bad.mkv").write_bytes(b"no video")
    world.write_clips(tmp_path, 2, 0, "short", 5)
    summary: CaptionSummary = caption_clips(
        listed_in(tmp_path), Counting(), tmp_path / "out" / "a.jsonl", LOOKS
    )
    assert summary.num_captioned == 0
    reasons = dict(summary.left_out)
    assert list(reasons) == ["000000.mp4", "000001.mp4", "bad.mkv"]
    assert reasons["000000.mp4"].startswith("has 5 video frames, want 9")
    assert reasons["bad.mkv"].startswith("cannot be read as video")


def test_the_tiny_world_captions_itself_and_is_packed(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches templates with words of another clip, and a table that `pack` does not read."""
    table = tmp_path / "captions.jsonl"
    command = ["curate", "caption", str(clips), "--model", "tiny", "--frames", "9"]
    assert main([*command, "--out", str(table)]) == 0
    assert "made up from another length: short 0.0%" in capsys.readouterr().out
    for number, row in enumerate(rows_of(table)):
        for level in world.IN_TURN:
            assert row[level] == world.clip_number(number, 0, level)[1]
    packing = ["pack", str(clips), "--codec", "tiny", "--frames", "9", "--captions", str(table)]
    assert main([*packing, "--out", str(tmp_path / "out")]) == 0
    reader = ShardReader(tmp_path / "out", "medium")
    assert reader.captions == [row["medium"] for row in rows_of(table)]


def test_every_option_of_a_step_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a step that `curate --help` does not name, and an option without a word."""
    for command, steps in STEPS.items():
        for step in steps:
            parser = parser_of(command, step)
            assert parser.prog == f"selfforcing-dfd {command} {step}"
            assert [action.dest for action in parser._actions if not action.help] == []
        assert main([command]) == 2
        assert main([command, "nonsense"]) == 2
        assert "invalid choice: 'nonsense'" in capsys.readouterr().err
