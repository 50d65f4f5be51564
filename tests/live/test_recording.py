"""Saving what was shown."""

from __future__ import annotations

import io
import json
import urllib.error
from fractions import Fraction

import av
import numpy as np
import pytest
from tabs import Tab, download, get, make_model, serving, wait_for

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.web.recording import Recording
from selfforcing_dfd.streaming.session import StreamModel

# levels of 255: JPEG and x264 at crf 18, on the pictures of a random network
ALIKE = 12.0
SIZE = (32, 48)


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def opened(data: bytes) -> tuple[np.ndarray, list[float], Fraction]:
    """Pictures [T, H, W, 3], times in seconds and the rate of an mp4."""
    with av.open(io.BytesIO(data)) as container:
        rate = container.streams.video[0].average_rate
        frames = list(container.decode(video=0))
    pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return pictures, [float(frame.time) for frame in frames], rate


def flat(level: int, num_frames: int = 8) -> np.ndarray:
    return np.full((num_frames, *SIZE, 3), level, np.uint8)


def levels(data: bytes) -> list[int]:
    """The grey level of each chunk of `flat` frames."""
    pictures, _, _ = opened(data)
    return [round(float(chunk.mean()), -1) for chunk in pictures[::8]]


def jpeg(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def test_what_was_shown_is_saved_while_it_goes_on(model):
    """Catches chunks that were only sent, a gap in the times, and another stream's pictures."""
    with serving(model, max_queue_chunks=2) as port, Tab(port) as tab, Tab(port).start("a disc", 9):
        stream = tab.until("hello")["stream"]
        tab.start("a disc", 2)
        chunks = [tab.chunk() for _ in range(4)]
        tab.chunk(ack=False)
        tab.send("nothing")
        tab.until("error")  # all acknowledgements before it have been heard
        pictures, times, rate = opened(download(port, f"/video.mp4?stream={stream}"))
        later, from_zero, _ = opened(download(port, f"/video.mp4?stream={stream}&first_chunk=2"))
    shown = np.stack([jpeg(frame) for chunk in chunks for frame in chunk.frames])
    assert pictures.shape == shown.shape == (5 + 3 * 8, *SIZE, 3)
    assert np.abs(pictures.astype(float) - shown).mean() < ALIKE
    assert rate == 16 and times == pytest.approx([i / 16 for i in range(29)], abs=1e-4)
    assert np.array_equal(later, pictures[13:])
    assert from_zero[0] == 0


def test_chunks_that_a_prompt_dropped_are_not_saved(model):
    """Catches a file with pictures that nobody has seen."""
    with serving(model, max_queue_chunks=2) as port, Tab(port) as tab:
        stream = tab.until("hello")["stream"]
        tab.start("a disc", 2)
        tab.chunk(), tab.chunk(ack=False), tab.chunk(ack=False)
        tab.send("prompt", text="a cross", mode="recache")
        tab.until("prompt")
        tab.send("ack", chunk=1)
        tab.chunk()
        tab.chunk(ack=False)
        tab.send("nothing")
        tab.until("error")
        pictures, _, _ = opened(download(port, f"/video.mp4?stream={stream}"))
    assert len(pictures) == 5 + 8 + 8


def test_a_stream_that_has_ended_can_still_be_saved(model):
    """Catches a recording that is lost with a connection, just when it matters."""
    with serving(model, max_queue_chunks=1, max_sessions=1) as port:
        with Tab(port) as tab:
            stream = tab.until("hello")["stream"]
            tab.start()
            tab.chunk()
            tab.send("nothing")
            tab.until("error")
        wait_for(lambda: json.loads(get(port, "/healthz")[1])["sessions"] == 0)
        path = f"/video.mp4?stream={stream}"
        assert len(opened(download(port, path))[0]) == 5
        for _ in range(3):
            with Tab(port) as other:
                other.until("hello")
            wait_for(lambda: json.loads(get(port, "/healthz")[1])["sessions"] == 0)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            download(port, path)


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        *[("", 404, "this stream is not known"), ("stream=x", 404, "this stream is not known")],
        ("stream={}", 404, "nothing has been shown"),
        ("stream={}&first_chunk=-1", 400, "first_chunk is '-1'; want a whole number"),
        ("stream={}&first_chunk=%C2%B2", 400, "first_chunk is '²'; want a whole number"),
    ],
)
def test_nothing_to_save_is_told(model, query, status, words):
    """Catches an error of the server, and an empty file."""
    with serving(model) as port, Tab(port) as tab:
        stream = tab.until("hello")["stream"]
        got, text = get(port, f"/video.mp4?{query.format(stream)}")
    assert got == status and words in json.loads(text)["message"]


def test_memory_is_bounded_in_time_and_in_bytes():
    """Catches a recording that grows for as long as a stream is watched."""
    by_time = Recording(16.0, keep_s=2.0)
    by_bytes = Recording(16.0, keep_bytes=20_000)
    noise = np.random.default_rng(0)
    for chunk in range(12):
        by_time.add(chunk, flat(20 * chunk))
        by_bytes.add(chunk, noise.integers(0, 255, (8, *SIZE, 3), np.uint8))
    assert levels(by_time.mp4()) == [160, 180, 200, 220]
    assert levels(by_time.mp4(10)) == [200, 220]
    assert 0 < by_bytes.num_bytes <= 20_000
    assert 0 < len(opened(by_bytes.mp4())[0]) < 12 * 8


def test_another_size_begins_a_new_file():
    """Catches a file of two sizes, which players refuse."""
    recording = Recording(16.0)
    recording.add(0, flat(40))
    recording.add(1, np.full((8, 16, 16, 3), 80, np.uint8))
    assert opened(recording.mp4())[0].shape == (8, 16, 16, 3)
    with pytest.raises(UserError, match="nothing has been shown"):
        recording.mp4(2)
