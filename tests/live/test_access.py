"""Who may use the live page: a token where others can reach the server."""

from __future__ import annotations

import http.client
import json
import stat
from pathlib import Path

import pytest
from tabs import PATIENCE_S, SETTINGS, Tab, get, make_model, post, serving
from websockets.exceptions import InvalidStatus

from selfforcing_dfd.cli.main import main
from selfforcing_dfd.common import UserError
from selfforcing_dfd.live import access, server
from selfforcing_dfd.live.access import find_token, is_loopback, link
from selfforcing_dfd.live.web.shared import Student
from selfforcing_dfd.streaming.session import StreamModel

TOKEN = "a-token_of-24-characters"
PATHS = ("/", "/page.js", "/healthz", "/video.mp4?stream=x", "/nowhere")


@pytest.fixture(scope="module")
def model() -> StreamModel:
    return make_model()


def redirect(port: int, path: str) -> tuple[int, str, str]:
    """Status, place and cookie of an answer that is not followed."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    line.request("GET", path)
    answer = line.getresponse()
    return answer.status, answer.getheader("location", ""), answer.getheader("set-cookie", "")


def test_nothing_is_answered_without_the_token(model):
    """Catches a path, method or socket that the guard forgets, and a token that is nearly it."""
    wrong = ("", TOKEN[:-1], f"{TOKEN}x", TOKEN.upper(), "ö", "%00", "x" * 5000)
    with serving(model, token=TOKEN) as port:
        for path in PATHS:
            assert get(port, path)[0] == 401
        for token in wrong:
            assert get(port, f"/?token={token.replace('ö', '%C3%B6')}")[0] == 401
            assert get(port, "/", Authorization=f"Bearer {token.replace('ö', 'o')}")[0] == 401
            assert get(port, "/", Cookie=f"stream_token_{port}={token.replace('ö', 'o')}")[0] == 401
        assert post(port, "/picture?stream=x", b"")[0] == 401
        for path in ("/stream", "/watch?stream=x", f"/stream?token={TOKEN[:-1]}"):
            with pytest.raises(InvalidStatus, match="403"), Tab(port, path=path):
                pass
        assert "open the page by the link that the server printed" in get(port, "/")[1]


def test_the_link_opens_everything(model):
    """Catches a token that stays in the address, or that scripts of the page could read."""
    with serving(model, token=TOKEN) as port:
        status, place, cookie = redirect(port, f"/?token={TOKEN}")
        assert (status, place) == (303, "/")
        assert cookie.startswith(f"stream_token_{port}={TOKEN};")
        assert "HttpOnly" in cookie and "samesite=lax" in cookie.lower()
        brought = {"Cookie": cookie.split(";")[0]}
        assert [get(port, path, **brought)[0] for path in PATHS] == [200, 200, 200, 404, 404]
        assert get(port, "/healthz", Authorization=f"Bearer {TOKEN}")[0] == 200
        # any name will do: the token says who may
        assert get(port, "/healthz", Host="gpu.example:80", **brought)[0] == 200
        with Tab(port, {"additional_headers": brought}).start() as tab:
            assert tab.chunk().info["index"] == 0


def test_a_token_does_not_let_other_sites_in(model):
    """Catches a page of another site that steers a stream with its visitor's cookie."""
    with serving(model, token=TOKEN) as port:
        headers = {"Cookie": f"stream_token_{port}={TOKEN}"}
        other = {"origin": "http://evil.example", "additional_headers": headers}
        with pytest.raises(InvalidStatus, match="403"), Tab(port, other):
            pass
        evil = {"Origin": "http://evil.example", **headers}
        assert post(port, "/picture?stream=x", b"", **evil)[0] == 403
        assert json.loads(get(port, "/healthz", **headers)[1])["sessions"] == 0


def test_tokens_are_compared_in_constant_time(model, monkeypatch):
    """Catches `==`, whose time tells how many letters of a guess are right."""
    compared = []
    whole = access.hmac.compare_digest
    monkeypatch.setattr(
        access.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or whole(a, b)
    )
    with serving(model, token=TOKEN) as port:
        assert get(port, "/", Authorization="Bearer guess")[0] == 401
    assert (b"guess", TOKEN.encode()) in compared


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *[("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)],
        *[("0.0.0.0", False), ("::", False), ("192.168.0.2", False), ("gpu.example", False)],
    ],
)
def test_a_host_that_others_can_reach_has_a_token(model, host, is_local):
    """Catches a page for everybody in the network."""
    assert is_loopback(host) == is_local
    assert (find_token(host, None) is None) == is_local
    if not is_local:
        app = server.create_app({"only": Student(model, SETTINGS)}, fps=16.0)
        with pytest.raises(UserError, match="which others can reach; give create_app a token"):
            server.serve(app, host)


def test_tokens_are_long_and_new():
    """Catches a token that can be guessed, or that is the same after every start."""
    tokens = {find_token("0.0.0.0", None) or "" for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) >= 32 for token in tokens)
    assert link("0.0.0.0", 80, "abc").endswith(":80/?token=abc")
    assert "0.0.0.0" not in link("0.0.0.0", 80, "abc")
    assert link("::1", 80, None) == "http://[::1]:80/"


def test_a_token_file_is_made_once_for_its_owner_alone(tmp_path: Path):
    """Catches a token that other users of the machine can read, and one that every start renews."""
    file = tmp_path / "token"
    token = find_token("127.0.0.1", file)
    assert token is not None and len(token) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert find_token("0.0.0.0", file) == token
    for wrong in ("", "short", "with spaces in between it", "x" * 200):
        file.write_text(wrong)
        with pytest.raises(UserError, match="holds no token; want one line of 16 to 128 letters"):
            find_token("0.0.0.0", file)


def test_options_of_the_page_are_refused_without_it(capsys):
    """Catches a host that is asked for and ignored."""
    assert main(["stream", "--host", "0.0.0.0", "--token-file", "x"]) == 2
    assert "--host, --token-file would have no effect" in capsys.readouterr().err


def test_the_token_is_in_no_log(model, capfd):
    """Catches a server that writes the links which it answers."""
    with serving(model, token=TOKEN) as port:
        assert redirect(port, f"/?token={TOKEN}")[0] == 303
        assert redirect(port, f"/nowhere?token={TOKEN}")[0] == 404
        assert redirect(port, f"/?token={TOKEN[:-2]}")[0] == 401
        with Tab(port, path=f"/stream?token={TOKEN}") as tab:
            tab.until("hello")
            tab.socket.socket.sendall(b"nonsense")
    written = capfd.readouterr()
    assert TOKEN[:-2] not in written.out + written.err
