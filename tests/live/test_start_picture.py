"""Streams that begin with a viewer's picture."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tabs import PATIENCE_S, SETTINGS, Tab, get, make_model, post, serving

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.server import whole
from selfforcing_dfd.live.web.messages import encode_jpeg
from selfforcing_dfd.live.web.pictures import MAX_PICTURE_BYTES, as_context, open_picture
from selfforcing_dfd.streaming.session import StreamModel, StreamSession


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def picture(kind: str = "PNG", size: tuple[int, int] = (96, 64), **options) -> bytes:
    """Left half red, right half blue; size: width and height."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2, 0] = 255
    pixels[:, size[0] // 2 :, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def begun_with(model: StreamModel, data: bytes, num_chunks: int) -> list[list[bytes]]:
    """What a session without a server makes of a picture; the picture comes with chunk 0."""
    context = as_context(open_picture(data), model.video_size)
    session = StreamSession(model, "a disc", replace(SETTINGS, seed=3), context)
    chunks = [[encode_jpeg(frame) for frame in session.context_frames.numpy()]]
    chunks += [[] for _ in range(num_chunks - 1)]
    for chunk in chunks:
        chunk += [encode_jpeg(frame) for frame in session.next_chunk().frames.numpy()]
    return chunks


def send(port: int, stream: str, data: bytes) -> tuple[int, str]:
    return post(port, f"/picture?stream={stream}", data)


def anew(tab: Tab) -> bool:
    """Wait for a new stream, as the page does; whether it has a picture."""
    began = tab.until("began")
    tab.send("ack", chunk=began["next_chunk"] - 1)
    return began["has_picture"]


def test_a_stream_goes_on_after_the_picture(model):
    """Catches a picture that is not shown, that a reset forgets, or that cannot be taken away."""
    with serving(model, max_queue_chunks=1) as port, Tab(port) as tab:
        stream = tab.until("hello")["stream"]
        tab.start("a disc", 3)
        plain = tab.chunk()
        assert send(port, stream, picture()) == (202, "")
        assert anew(tab)
        wanted = begun_with(model, picture(), 2)
        assert [tab.chunk().frames, tab.chunk().frames] == wanted
        tab.send("reset")
        assert anew(tab)
        assert tab.chunk().frames == wanted[0]
        tab.send("drop_picture")
        assert not anew(tab)
        assert tab.chunk().frames == plain.frames


def test_a_student_that_needs_a_picture_waits_for_one(model):
    """Catches a student that makes its first frame, which it has never learnt."""
    given = replace(model, given=1)
    with serving(given, max_queue_chunks=1) as port, Tab(port) as tab:
        hello = tab.until("hello")
        assert hello["students"][0]["needs_picture"]
        tab.send("start", prompt="a disc", seed=3)
        error = tab.until("error")
        assert error["about"] == "picture" and "begins with a picture" in error["message"]
        assert send(port, hello["stream"], picture()) == (202, "")
        assert tab.until("picture")["has_picture"]
        tab.start("a disc", 3)
        assert tab.chunk().frames == begun_with(given, picture(), 1)[0]
        tab.send("drop_picture")
        assert "begins with a picture" in tab.until("error")["message"]


HARMED = {
    "text": (b"not a picture" * 100, 415, "no picture that is known here"),
    "nothing": (b"", 415, "no picture that is known here"),
    "cut": (picture("PNG")[:100], 415, "damaged"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415, "no picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "no picture"),
    "gif": (picture("GIF"), 415, "no picture"),
    "too many bytes": (b"\0" * (MAX_PICTURE_BYTES + 1), 413, "more than 16 MiB"),
}


def test_what_is_no_picture_is_refused_and_the_stream_goes_on(model):
    """Catches a traceback, a file that names other files, and a stream that ends with it."""
    with serving(model, max_queue_chunks=1) as port, Tab(port) as tab:
        stream = tab.until("hello")["stream"]
        tab.start()
        for name, (data, status, words) in HARMED.items():
            got, text = send(port, stream, data)
            assert (got, words in text) == (status, True), (name, got, text)
        assert send(port, "x", picture())[0] == 404
        assert get(port, f"/picture?stream={stream}")[0] == 405
        assert [tab.chunk().info["index"] for _ in range(2)] == [0, 1]


def test_a_small_file_may_not_unpack_to_a_large_picture():
    """Catches a bomb: 100 million pixels in a file of a few kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 5_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 50_000
    with pytest.raises(ValueError, match="20000 x 5000 pixels; send one of at most 64 million"):
        open_picture(buffer.getvalue())


def test_a_picture_of_unstated_length_is_bounded_too(model):
    """Catches a server that holds all that is sent without a stated length, or waits for ever."""
    with serving(model) as port, Tab(port) as tab:
        stream = tab.until("hello")["stream"]
        head = f"POST /picture?stream={stream} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as line:
            line.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(17):
                line.sendall(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
            line.sendall(b"0\r\n\r\n")
            assert b" 413 " in line.recv(4096)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as line:
            line.sendall(f"{head}Content-Length: 5000000\r\n\r\nabc".encode())
        tab.start()
        assert tab.chunk().info["index"] == 0


def test_what_is_too_large_is_not_read_without_end():
    """Catches a client that sends for ever, and an answer that is lost because nobody reads on."""
    taken = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            taken.append(1)
            yield b"x" * 10

    async def read() -> None:
        await whole(endless(), 25, 100)

    with pytest.raises(UserError, match="more than"):
        asyncio.run(read())
    assert len(taken) == 10


def test_pictures_are_upright_cropped_and_without_holes():
    """Catches a photo on its side, one that is squeezed, and transparency that turns black."""
    turned = Image.open(io.BytesIO(picture())).rotate(90, expand=True)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned: show it by 90 degrees clockwise
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    upright = as_context(open_picture(buffer.getvalue()), (32, 48))[0]
    assert upright.shape == (32, 48, 3)
    assert upright[16, 5, 0] > 0.9 and upright[16, 43, 2] > 0.9
    wide = as_context(open_picture(picture(size=(400, 64))), (32, 48))[0]
    assert wide[16, 5, 0] > 0.9 and wide[16, 43, 2] > 0.9
    buffer = io.BytesIO()
    Image.new("RGBA", (48, 32), (255, 0, 0, 0)).save(buffer, "PNG")
    assert (as_context(open_picture(buffer.getvalue()), (32, 48)) - 0.5).abs().max() < 0.01
    assert max(open_picture(picture("JPEG", (5000, 100))).size) == 2048
