"""Several viewers of one stream."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack

import pytest
from tabs import Tab, alone, get, make_model, num_sessions, serving, wait_for
from websockets.exceptions import ConnectionClosed

from selfforcing_dfd.common import resident_bytes
from selfforcing_dfd.live.web.connection import Ended, Outbox, Parcel
from selfforcing_dfd.streaming.session import StreamModel


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def owned(port: int) -> tuple[Tab, str]:
    """A tab with a stream that has not begun, and how others watch it."""
    tab = Tab(port)
    return tab, f"/watch?stream={tab.until('hello')['stream']}"


def num_watchers(port: int) -> int:
    return json.loads(get(port, "/healthz")[1])["watchers"]


def test_all_see_the_same(model):
    """Catches a watcher who gets a stream of its own, or other frames."""
    with serving(model, max_queue_chunks=1, fps=8.0) as port:
        owner, path = owned(port)
        with owner, Tab(port, path=path) as one, Tab(port, path=path) as two:
            wait_for(lambda: num_watchers(port) == 2)
            owner.start("a disc", 3)
            assert one.until("began")["prompt"] == "a disc"
            seen = [owner.chunk().frames for _ in range(3)]
            assert [one.chunk().frames for _ in range(3)] == seen
            assert [two.chunk().frames for _ in range(3)] == seen
            assert num_sessions(port) == 1
    assert seen == alone(model, "a disc", 3, 3)


def test_who_comes_later_sees_what_is_made_from_now_on(model):
    """Catches a watcher who is told nothing of the stream that runs, or of a pause."""
    with serving(model, max_queue_chunks=1, fps=8.0) as port:
        owner, path = owned(port)
        with owner:
            owner.start("a disc", 3)
            owner.chunk(), owner.chunk(ack=False)
            with Tab(port, path=path) as late:
                assert late.until("began")["seed"] == 3
                assert not late.until("state")["paused"]
                assert owner.until("viewers")["count"] == 2
                owner.send("ack", chunk=1)
                assert late.until("chunk")["index"] == 2
                owner.send("pause")
                assert late.until("state")["paused"]
            assert owner.until("viewers")["count"] == 1


def test_a_watcher_steers_nothing(model):
    """Catches a link to watch that lets others change, pause or end a stream."""
    with serving(model, max_queue_chunks=1, fps=8.0) as port:
        owner, path = owned(port)
        with owner.start(), Tab(port, path=path) as watcher:
            for kind in ("pause", "reset", "drop_picture"):
                watcher.send(kind)
                assert f"got {kind}; who watches" in watcher.until("error")["message"]
            watcher.send("prompt", text="a cross", mode="keep")
            assert "got prompt; who watches" in watcher.until("error")["message"]
            infos = [owner.chunk().info for _ in range(3)]
    assert {info["prompt"] for info in infos} == {"a disc"}


def test_a_slow_viewer_slows_nobody_and_misses_chunks(model):
    """Catches a stream that waits for one who reads nothing, be it a watcher or the owner."""
    with serving(model, max_queue_chunks=2, fps=160.0) as port:
        owner, path = owned(port)
        narrow = {"max_queue": 1, "close_timeout": 0.1}
        with owner, Tab(port, narrow, path=path), Tab(port, path=path) as quick:
            wait_for(lambda: num_watchers(port) == 2)
            owner.start()
            infos = []
            while len(infos) < 20:  # the owner acknowledges nothing, and one watcher reads nothing
                infos.append(quick.until("chunk"))
                quick.send("ack", chunk=infos[-1]["chunk"])
            indices = [info["index"] for info in infos]
    assert indices == sorted(indices)
    assert indices[-1] < 30


def test_watchers_wait_for_the_clock_and_not_for_each_other(model):
    """Catches a stream that runs away, as fast as it can, when somebody watches."""
    with serving(model, max_queue_chunks=2, fps=40.0) as port:
        owner, path = owned(port)
        with owner, Tab(port, path=path) as watcher:
            wait_for(lambda: num_watchers(port) == 1)
            owner.start()
            watcher.until("chunk")
            started = time.monotonic()
            num_frames = sum(watcher.until("chunk")["num_frames"] for _ in range(10))
            took_s = time.monotonic() - started
    # two chunks may be ahead of the clock
    assert num_frames / took_s < 40 * 10 / 8 * 1.05


def test_the_owners_end_is_everybodys(model):
    """Catches watchers before a frozen picture, and a stream that outlives its owner."""
    with serving(model, max_queue_chunks=1) as port:
        owner, path = owned(port)
        with Tab(port, path=path) as watcher:
            owner.start()
            owner.socket.close()
            code, reason = watcher.closing()
        assert (code, reason) == (1001, "the stream that you watched has ended")
        wait_for(lambda: num_sessions(port) == num_watchers(port) == 0)
        with Tab(port, path=path) as late:
            assert late.closing() == (4404, "the stream of this link is not running")


def test_fifty_viewers_come_and_go(model):
    """Catches viewers who cost a stream each, and memory that grows with those who do not read."""
    with serving(model, max_queue_chunks=2, fps=80.0) as port, ExitStack() as stack:
        owner, path = owned(port)
        stack.enter_context(owner)
        watchers = [stack.enter_context(Tab(port, path=path)) for _ in range(50)]
        wait_for(lambda: num_watchers(port) == 50)
        owner.start()
        for watcher in watchers[:25]:
            assert watcher.until("chunk")["prompt"] == "a disc"
        before = resident_bytes()
        for watcher in watchers[:10]:
            watcher.socket.socket.shutdown(socket.SHUT_RDWR)
        for _ in range(8):
            watchers[20].until("chunk")
        assert resident_bytes() - before < 100 * 2**20
        wait_for(lambda: num_watchers(port) == 40)
        assert owner.until("chunk")["prompt"] == "a disc"


def test_there_is_an_end_to_those_who_may_watch(model, monkeypatch):
    """Catches any number of connections."""
    monkeypatch.setattr("selfforcing_dfd.live.server.MAX_WATCHERS", 1)
    with serving(model) as port:
        owner, path = owned(port)
        with owner, Tab(port, path=path), Tab(port, path=path) as third:
            code, reason = third.closing()
            assert code == 1013 and "1 others watch" in reason


def test_a_stream_that_only_others_watch_ends_when_they_do(model):
    """Catches a stream that runs for ever for tabs that nobody looks at."""
    with serving(model, max_queue_chunks=1, fps=80.0, idle_s=1.0) as port:
        owner, path = owned(port)
        with owner, Tab(port, path=path) as watcher:
            owner.start()
            for _ in range(4):
                chunk = watcher.until("chunk")["chunk"]
                time.sleep(0.3)
                watcher.send("ack", chunk=chunk)
            with pytest.raises(ConnectionClosed):
                while True:
                    watcher.socket.recv(5)


def test_the_outbox_is_bounded():
    """Catches a queue that grows for a viewer who takes nothing."""

    async def fill() -> list[object]:
        outbox = Outbox(2)
        outbox.put("began")
        for chunk in range(5):
            outbox.put(Parcel(chunk, "", []))
        outbox.put("prompt")
        outbox.drop_after(3)
        got = [await outbox.get(0.01) for _ in range(4)]
        for _ in range(300):
            outbox.put("state")
        with pytest.raises(Ended, match="too slow for the stream"):
            await outbox.get(0.01)
        return [each.chunk if isinstance(each, Parcel) else each for each in got]

    assert asyncio.run(fill()) == ["began", 3, "prompt", None]
