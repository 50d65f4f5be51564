"""The live page of `python inference/stream.py --serve`, for the browsers of this machine.

Every tab has a stream of its own, see `web.viewer`, and one WebSocket, see `web.messages`.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.web.messages import short
from selfforcing_dfd.live.web.shared import Shared, Student
from selfforcing_dfd.live.web.viewer import Ended, Viewer

WEB = Path(__file__).parent / "web"
PAGES = {
    "/": "page.html",
    **{f"/{name}": name for name in ("page.css", "page.js", "player.js", "graph.js")},
}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
MAX_SOCKET_BYTES = 256 * 1024  # beyond it the protocol itself ends the connection, unread
TRY_LATER = 1013
SHUTDOWN_S = 2
HEADERS = {
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


def refusal(headers: Headers) -> str:
    """Why a request is refused; empty if it is not.

    The Host must be a name of this machine, or another site's name could be made to point here (DNS
    rebinding). An Origin, which a browser sends with every WebSocket, must be this server's own: a
    page of another site must not drive a stream.
    """
    hosts = headers.getlist("host")
    origin = headers.get("origin")
    if len(hosts) != 1 or host_name(hosts[0]) not in LOCAL_HOSTS:
        return (
            f"got Host {short(', '.join(hosts))}; "
            "open this page as http://localhost or http://127.0.0.1 and its port"
        )
    if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
        return f"got Origin {short(origin)}; want this server's own page, http://{hosts[0]}"
    return ""


def host_name(host: str) -> str:
    """A Host header without its port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True)
class LocalOnly:
    """Answers 403 to what `refusal` refuses, WebSockets included."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = refusal(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else ""
        if reason and scope["type"] == "websocket":
            # before it is accepted: the browser gets a 403
            await WebSocket(scope, receive, send).close(reason=reason)
        else:
            await (PlainTextResponse(reason, 403) if reason else self.app)(scope, receive, send)


@dataclass(frozen=True, slots=True)
class StreamServer:
    """The requests that are answered, and who is connected."""

    shared: Shared
    max_sessions: int
    viewers: set[Viewer] = field(default_factory=set)

    async def stream(self, websocket: WebSocket) -> None:
        """One connection, from its handshake to its end."""
        await websocket.accept()
        viewer = Viewer(self.shared, websocket)
        if len(self.viewers) >= self.max_sessions:
            plural = "streams are" if len(self.viewers) > 1 else "stream is"
            why = (
                f"{len(self.viewers)} other {plural} running, and no more are allowed; "
                "close one and try again"
            )
            await viewer.end(Ended(TRY_LATER, why))
            return
        self.viewers.add(viewer)
        try:
            await viewer.run()
        finally:
            self.viewers.discard(viewer)

    async def page(self, request: Request) -> FileResponse:
        return FileResponse(WEB / PAGES[request.url.path], headers=HEADERS)

    async def health(self, _: Request) -> JSONResponse:
        students = self.shared.students
        facts = {
            "status": "ok",
            "sessions": len(self.viewers),
            "max_sessions": self.max_sessions,
            "fps": self.shared.fps,
            "students": self.shared.facts,
            "settings": {name: asdict(one.settings) for name, one in students.items()},
        }
        return JSONResponse(facts, headers=HEADERS)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        self.shared.worker.shutdown(cancel_futures=True)


def create_app(
    students: Mapping[str, Student],
    *,
    fps: float,
    max_sessions: int = 2,
    idle_s: float = 60,
    max_queue_chunks: int = 2,
    examples: Sequence[str] = (),
) -> Starlette:
    """The page, its WebSocket `/stream` and `/healthz`.

    students: by the names that the page shows; the first one is played at once. A connection beyond
    max_sessions is told so and closed with code 1013. One that is idle for idle_s seconds, or
    acknowledges nothing for as long while it is not paused, is told and closed. A viewer's stream
    is at most max_queue_chunks chunks ahead of what was shown. examples: prompts that the page
    offers; it begins with the first one. Raises UserError for settings that do not fit a model.
    """
    if max_sessions < 1:
        raise UserError(f"max_sessions is {max_sessions}; want at least 1")
    shared = Shared(students, fps, idle_s, max_queue_chunks, examples)
    server = StreamServer(shared, max_sessions)
    routes = [*(Route(path, server.page) for path in PAGES), Route("/healthz", server.health)]
    return Starlette(
        routes=[*routes, WebSocketRoute("/stream", server.stream)],
        middleware=[Middleware(LocalOnly)],
        lifespan=server.lifespan,
    )


def serve(app: Starlette, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Answer requests until Ctrl-C. Raises OSError if the port cannot be used.

    From another machine: `ssh -L 8000:localhost:8000`; other host names are refused.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen: {error}; choose another port") from error
    with listener, suppress(KeyboardInterrupt):  # uvicorn raises it once more after a clean end
        uvicorn.Server(server_config(app)).run(sockets=[listener])


def server_config(app: Starlette) -> uvicorn.Config:
    """No compression: JPEG gains nothing, and a small message could unpack into a large one."""
    return uvicorn.Config(
        app,
        log_level="warning",
        ws_max_size=MAX_SOCKET_BYTES,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
