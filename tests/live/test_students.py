"""Several students on the live page: the switch between them, and the options that offer them."""

from __future__ import annotations

import argparse
import gc
import json
import re
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from tabs import Tab, alone, get, make_model, running, serving
from tiny_models import tiny_network
from tiny_wan import HEIGHT, RECIPE, WIDTH, save_wan_folder, tiny_parts, tiny_student

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.cli.stream_commands import stream as stream_command
from selfforcing_dfd.live import play, ready, server
from selfforcing_dfd.live.play import load_students
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.streaming.load import TINY_DMD_STUDENT, TINY_STUDENT, load_stream_model
from selfforcing_dfd.streaming.pipeline import CausalWanPipeline, export_scheduler
from selfforcing_dfd.streaming.session import StreamModel, StreamSession
from selfforcing_dfd.tiny.text import TinyText


@pytest.fixture(scope="module")
def models() -> dict[str, StreamModel]:
    """Two students that differ in all that the page has to keep apart."""
    network = tiny_network(seed=1, in_channels=16, out_channels=16, num_layers=1)
    other = make_model(
        student=network.requires_grad_(False),
        text=TinyText(12, 4),
        ladder=(1.0, 0.8, 0.4),
        keeps_noise=True,
        latent_size=(6, 4),
    )
    return {"one": make_model(), "other": other}


def switch(tab: Tab, name: str) -> dict:
    """Choose a student, and acknowledge what will not be shown any more, as the page does."""
    tab.send("student", name=name)
    began = tab.until("began")
    tab.send("ack", chunk=began["next_chunk"] - 1)
    return began


def two_chunks(tab: Tab) -> list[list[bytes]]:
    """The pictures of two chunks, of which the second one is not acknowledged."""
    return [tab.chunk().frames, tab.chunk(ack=False).frames]


def test_the_switch_begins_anew_and_leads_back(models):
    """Catches a student that goes on in another's stream, or with its seed, ladder or noise."""
    with serving(models, max_queue_chunks=1) as port, Tab(port).start("a cross", 3) as tab:
        before = two_chunks(tab)
        assert switch(tab, "other") == {
            "type": "began",
            "student": "other",
            "prompt": "a cross",
            "seed": 3,
            "next_chunk": 2,
            "has_picture": False,
            "unknown": [],
            "first": "a cross",
            "changes": [],
            "num_coming": 0,
        }
        between = two_chunks(tab)
        assert switch(tab, "one")["student"] == "one"
        after = two_chunks(tab)
    assert between == alone(models["other"], "a cross", 3, 2)
    assert between != before
    assert after == before == alone(models["one"], "a cross", 3, 2)


def test_the_switch_takes_the_prompt_and_seed_that_are_shown(models):
    """Catches a comparison under the prompt of the start, or under the seed of the next reset."""
    with serving(models, max_queue_chunks=1) as port, Tab(port).start("a disc", 3) as tab:
        tab.chunk(ack=False)
        tab.send("prompt", text="a cross", mode="keep")
        tab.send("seed", seed=7)
        assert switch(tab, "other")["seed"] == 3
        assert two_chunks(tab) == alone(models["other"], "a cross", 3, 2)
        tab.send("reset")
        began = tab.until("began")
        assert (began["student"], began["seed"]) == ("other", 7)
        tab.send("ack", chunk=began["next_chunk"] - 1)
        assert two_chunks(tab) == alone(models["other"], "a cross", 7, 2)


def test_a_student_that_is_chosen_before_the_start_begins(models):
    """Catches a choice that a new connection forgets."""
    with serving(models, max_queue_chunks=1) as port, Tab(port) as tab:
        tab.send("student", name="other")
        tab.send("start", prompt="a disc", seed=2)
        assert tab.until("began")["student"] == "other"
        assert two_chunks(tab) == alone(models["other"], "a disc", 2, 2)


def test_the_switch_waits_for_the_viewer(models):
    """Catches a switch that empties the queue of unseen chunks, or that ends a pause."""
    with serving(models, max_queue_chunks=2) as port, Tab(port).start() as tab:
        assert tab.num_waiting_chunks() == 2
        tab.send("student", name="other")
        assert tab.until("began")["next_chunk"] == 2
        assert tab.num_waiting_chunks() == 0
        tab.send("pause")
        switch(tab, "one")
        assert tab.num_waiting_chunks() == 0
        tab.send("resume")
        assert tab.num_waiting_chunks() == 2


def test_an_unknown_student_is_refused_by_name(models):
    """Catches a connection that ends for a wrong name, and an error that does not help."""
    told = "student: name is 'neither'; want one of one, other"
    with serving(models, max_queue_chunks=1) as port, Tab(port) as tab:
        tab.send("student", name="neither")
        assert tab.until("error")["message"] == told
        tab.start("a disc", 1)
        chunks = [tab.chunk(ack=False).frames]
        tab.send("student", name="neither")
        error = tab.until("error")
        assert (error["about"], error["message"]) == ("message", told)
        tab.send("ack", chunk=0)
        chunks.append(tab.chunk(ack=False).frames)
    assert chunks == alone(models["one"], "a disc", 1, 2)


def test_a_student_that_refuses_the_prompt_is_not_shown(models):
    """Catches a stream that is lost, or shown under the wrong name, with a prompt too long."""
    prompt = "a disc moves left today"
    with serving(models, max_queue_chunks=1) as port, Tab(port).start(prompt, 1) as tab:
        chunks = [tab.chunk(ack=False).frames]
        tab.send("student", name="other")
        error = tab.until("error")
        assert error["about"] == "prompt" and "5 words, 4 fit" in error["message"]
        tab.send("ack", chunk=0)
        chunks += [tab.chunk(ack=False).frames]
        assert chunks == alone(models["one"], prompt, 1, 2)
        tab.send("reset")
        assert tab.until("began")["student"] == "one"


def test_the_page_knows_the_sizes_of_every_student(models):
    """Catches figures of one student under another's video."""
    with serving(models) as port, Tab(port) as tab:
        one, other = tab.until("hello")["students"]
        health = json.loads(get(port, "/healthz")[1])
    assert [one["name"], other["name"]] == ["one", "other"] == list(health["settings"])
    assert (one["width"], one["height"], one["num_steps"]) == (48, 32, 2)
    assert (other["width"], other["height"], other["num_steps"]) == (32, 48, 3)
    assert one["cache_bytes"] == 2 * other["cache_bytes"]
    assert "3 steps and a commit pass a chunk, 32 x 48 pixels" in other["about"]


def test_one_student_needs_no_switch(models):
    """Catches a switch with nothing to choose: the page hides it, until hello lists two."""
    with serving(models["one"]) as port, Tab(port) as tab:
        assert len(tab.until("hello")["students"]) == 1
        page = get(port, "/")[1]
        script = get(port, "/page.js")[1]
    assert re.search(r'<fieldset [^>]*id="students" [^>]*hidden>', page)
    assert '$("students").hidden = names.length < 2' in script


def offered(*arguments: str) -> dict[str, Student]:
    """What a command line offers."""
    parser = argparse.ArgumentParser()
    stream_command(parser)
    return load_students(parser.parse_args(["--serve", "--device", "cpu", *arguments]))


def test_the_page_is_warmed_up_by_the_thread_that_makes_its_chunks(monkeypatch):
    """Catches plans on a thread that computes nothing, and a stream that stays after it.

    cuDNN's plans belong to the thread that made them; a viewer would wait for new ones.
    """
    threads: list[int] = []
    sessions: list[weakref.ref[StreamSession]] = []
    found: list[int] = []

    def warm_up(session: StreamSession, context: Any, run: Any) -> None:
        run(lambda: threads.append(threading.get_ident()))
        sessions.append(weakref.ref(session))

    def serve(app: Starlette, *_: Any) -> None:
        gc.collect()
        assert [ref() for ref in sessions] == [None, None]
        with running(app) as port, Tab(port) as tab:
            tab.start("a disc moves").chunk()

    next_chunk = StreamSession.next_chunk

    def noted(session: StreamSession) -> Any:
        found.append(threading.get_ident())
        return next_chunk(session)

    monkeypatch.setattr(StreamSession, "next_chunk", noted)
    monkeypatch.setattr(play, "is_warmed_up", lambda *_: True)
    monkeypatch.setattr(ready, "warm_up", warm_up)
    monkeypatch.setattr(server, "serve", serve)
    assert main(["stream", "--serve", "--device", "cpu"]) == 0
    assert len(threads) == 2
    assert {*threads} == {*found}


def same_weights(one: StreamModel, other: StreamModel) -> bool:
    theirs = other.student.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in one.student.state_dict().items())


def test_the_tiny_world_offers_its_two_students():
    """Catches a page that begins with the DMD student, or runs one with the other's noise."""
    students = offered("--seed", "4")
    assert list(students) == ["stable", "DMD"]
    assert [one.model.keeps_noise for one in students.values()] == [True, False]
    for student, file in zip(students.values(), (TINY_STUDENT, TINY_DMD_STUDENT), strict=True):
        assert same_weights(student.model, load_stream_model(checkpoint=str(file)))
        assert (student.settings.seed, student.settings.window_frames) == (4, 6)


def test_a_student_that_is_named_stands_alone_or_beside_others():
    """Catches the shipped students beside one's own, and options that only the first one gets."""
    dmd = "assets/tiny/student.safetensors"
    assert list(offered("--weights", dmd)) == ["student"]
    students = offered("--weights", dmd, "--beside", "mine=assets/tiny/stable.safetensors")
    assert list(students) == ["student", "mine"]
    same = offered("--beside", f"a={dmd}", "--beside", f"b={dmd}", "--ladder", "1000,500")
    assert list(same) == ["stable", "a", "b"]
    assert [len(one.model.ladder) for one in same.values()] == [2, 2, 2]


def test_students_of_wan_share_vae_and_text_encoder(tmp_path: Path):
    """Catches a second copy of the largest parts, and a student that is loaded twice."""
    size = ("--size", f"{HEIGHT}x{WIDTH}")
    parts = tiny_parts()
    for name in ("a", "b"):
        pipe = CausalWanPipeline(tiny_student(), *parts, export_scheduler(RECIPE))
        pipe.save_pretrained(tmp_path / name)
    wan = save_wan_folder(tmp_path / "wan")
    beside = ("--beside", f"second={tmp_path / 'b'}")
    students = offered("--model", str(wan), "--weights", str(tmp_path / "a"), *size, *beside)
    assert list(students) == ["a", "second"]
    first, second = (student.model for student in students.values())
    assert first.codec is second.codec and first.text is second.text
    assert first.student is not second.student
    assert first.video_size == second.video_size == (HEIGHT, WIDTH)
    assert list(offered("--model", str(tmp_path / "a"), *size)) == ["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beside", "a=b"], "--beside would have no effect without the web page; add --serve"),
        (["--serve", "--beside", "a.safetensors"], "'a.safetensors', want NAME=FILE such as DMD="),
        (["--serve", "--beside", "=a.safetensors"], "'=a.safetensors', want NAME=FILE"),
        (["--serve", "--beside", "a="], "'a=', want NAME=FILE"),
        (["--serve", "--beside", "stable=a.safetensors"], "two students are called 'stable'"),
        (["--serve", "--beside", "a=b", "--beside", "a=c"], "two students are called 'a'"),
        (["--serve", "--beside", "a=nowhere.safetensors"], "nowhere.safetensors does not exist"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys, monkeypatch):
    """Catches a server that starts without a student that was asked for."""
    monkeypatch.setattr(server, "serve", lambda *_, **__: pytest.fail("it serves"))
    assert main(["stream", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
