"""A real browser without a screen: Chromium, told what to do over its debugging protocol.

And the page's server, as a user starts it.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from websockets.sync.client import ClientConnection, connect

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--remote-debugging-port=0", "--hide-scrollbars", "--mute-audio"),
)


class Page:
    """One tab. Everything waits until it is done, and fails after PATIENCE_S."""

    def __init__(self, line: ClientConnection, session: str, ids: Iterator[int]) -> None:
        self._line = line
        self._session = session
        self._ids = ids
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **fields: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        number = next(self._ids)
        command = {"id": number, "sessionId": self._session, "method": method, "params": fields}
        self._line.send(json.dumps(command))
        end = time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < end, ("no answer", method, fields)
            message = json.loads(self._line.recv(PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what the page complains of."""
        fields = event.get("params", {})
        if event.get("sessionId") != self._session:
            return
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(fields["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded" and fields["entry"]["level"] == "error":
            self.errors.append(fields["entry"]["text"])

    def open(self, url: str) -> None:
        """Go there and wait for the page, of which the scripts may have run or not."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.protocol !== 'about:'")

    def do(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def until(self, script: str, patience_s: float = PATIENCE_S) -> Any:
        """The expression's value, as soon as it is true."""
        end = time.monotonic() + patience_s
        while not (value := self.do(script)):
            assert time.monotonic() < end, (script, self.do("document.body.innerText"))
            time.sleep(0.02)
        return value

    def front(self) -> None:
        """Put this tab before the others: what is hidden plays nothing."""
        self.call("Page.bringToFront")

    def close(self) -> None:
        self.call("Page.close")

    def text(self, element: str) -> str:
        return self.do(f"document.getElementById({element!r}).textContent")

    def until_phase(self, phase: str, patience_s: float = PATIENCE_S) -> None:
        """The state that the page shows."""
        self.until(f"document.getElementById('state')?.dataset.phase === {phase!r}", patience_s)

    def reload(self) -> None:
        """Load the page anew, and wait until it is live again and not still the one before."""
        self.do("window.isOld = true")
        self.do("location.reload()")
        self.until("!window.isOld")
        self.until_phase("live")

    def click(self, element: str) -> None:
        self.until(f"!document.getElementById({element!r}).disabled")
        self.do(f"document.getElementById({element!r}).click()")

    def press(self, key: str, code: str = "", text: str = "") -> None:
        """A key, as from a keyboard."""
        names = {"key": key, "code": code or key}
        number = {"Enter": 13, "Tab": 9, " ": 32}.get(key, 0)
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            windowsVirtualKeyCode=number,
            text=text,
            **names,
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", windowsVirtualKeyCode=number, **names)

    def write(self, element: str, text: str) -> None:
        """Text in place of what is in a field."""
        self.do(f"{{let f = document.getElementById({element!r}); f.focus(); f.select()}}")
        self.call("Input.insertText", text=text)

    def ask(self, prompt: str) -> None:
        """A new prompt, as it is typed."""
        self.write("prompt", prompt)
        self.press("Enter", text="\r")

    def choose_file(self, element: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=f"#{element}")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def size(self, width: int, height: int, is_phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if is_phone else 1,
            mobile=is_phone,
        )

    def scheme(self, name: str) -> None:
        """light or dark."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def network(self, is_up: bool) -> None:
        self.call(
            "Network.emulateNetworkConditions",
            offline=not is_up,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def screenshot(self, path: Path, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


class Browser:
    """Chromium with a profile of its own."""

    def __init__(self, line: ClientConnection) -> None:
        self._line = line
        self._ids = itertools.count(1)

    def call(self, method: str, **fields: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._line.send(json.dumps({"id": number, "method": method, "params": fields}))
        while (message := json.loads(self._line.recv(PATIENCE_S))).get("id") != number:
            pass
        return message["result"]

    def page(self) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self._line, session, self._ids)

    def save_to(self, folder: Path) -> None:
        """Downloads go there."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in an empty folder."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "there is no chromium; install it, such as by apt-get install chromium"
    command = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    port_file = folder / "DevToolsActivePort"
    try:
        wait_until(lambda: port_file.is_file() and len(port_file.read_text().split()) == 2)
        port, path = port_file.read_text().split()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, compression=None) as line:
            yield Browser(line)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        log.close()


@contextmanager
def serving(*options: str, port: int = 0) -> Iterator[str]:
    """The command, as a user starts it, and the link that it prints."""
    number = str(port or free_port())
    command = [sys.executable, "-m", "selfforcing_dfd", "stream", "--serve", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--port", number, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = ""
        while not line.startswith("open "):
            line = process.stderr.readline()
            assert line, "the server has ended"
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_until(condition: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What the condition returns, as soon as it is true."""
    end = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value
