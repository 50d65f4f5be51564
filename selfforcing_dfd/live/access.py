"""Who may use the live page: this machine's browsers, or those who have the token."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
import socket
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from selfforcing_dfd.common import UserError
from selfforcing_dfd.live.web.messages import short

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::")
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
COOKIE_S = 30 * 24 * 3600
ASK = "open the page by the link that the server printed when it started"


@dataclass(frozen=True, slots=True)
class Access:
    """What the guard asks for. token: None lets in this machine's browsers, and only them."""

    token: str | None = None

    def refusal(self, headers: Headers, query: str, cookie: str) -> tuple[int, str]:
        """Status and reason for which a request is refused; (0, "") if it is not.

        An Origin, which a browser sends with every WebSocket and POST, must be this server's own: a
        page of another site must not drive a stream. Without a token the Host must be a name of
        this machine, or another site's name could be made to point here (DNS rebinding). With one,
        any name will do: a browser gives the cookie to none but the name that it came from.
        """
        hosts = headers.getlist("host")
        origin = headers.get("origin")
        is_local = len(hosts) == 1 and host_name(hosts[0]) in LOCAL_HOSTS
        if len(hosts) != 1 or not (is_local or self.token):
            return 403, (
                f"got Host {short(', '.join(hosts))}; "
                "open this page as http://localhost or http://127.0.0.1 and its port"
            )
        if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            return 403, f"got Origin {short(origin)}; want this server's own page"
        if not self.admits(headers, query, cookie):
            return 401, f"this page needs a token; {ASK}"
        return 0, ""

    def admits(self, headers: Headers, query: str, cookie: str) -> bool:
        """Whether a request brings the token: in its link, its cookie, or as a bearer's."""
        if self.token is None:
            return True
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        brought = [*tokens_in(query), bearer, cookie_in(headers, cookie)]
        return any(same(each, self.token) for each in brought)


def same(one: str, other: str) -> bool:
    """Whether two texts are equal, in a time that does not say where they differ."""
    return hmac.compare_digest(one.encode(errors="replace"), other.encode())


def tokens_in(query: str) -> list[str]:
    """The values of `token` in a query string."""
    try:
        return parse_qs(query, max_num_fields=20).get("token", [])
    except ValueError:
        return []


def cookie_in(headers: Headers, name: str) -> str:
    """A cookie's value; empty if there is none."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def host_name(host: str) -> str:
    """A Host header without its port; empty if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True)
class Guard:
    """Answers 401 or 403 to what `Access` refuses, WebSockets included.

    A link with the token is answered by a cookie and by the same address without the token, so that
    it stays in no history and is passed on by nobody who copies the address.
    """

    app: ASGIApp
    access: Access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        cookie = cookie_name(scope)
        query = scope.get("query_string", b"").decode("latin-1")
        status, reason = self.access.refusal(Headers(scope=scope), query, cookie)
        if reason and scope["type"] == "websocket":
            # before it is accepted: the browser gets a 403
            await WebSocket(scope, receive, send).close(reason=reason)
        elif reason:
            await PlainTextResponse(reason, status, HEADERS)(scope, receive, send)
        elif self.access.token and scope["path"] == "/" and tokens_in(query):
            await admitted(cookie, self.access.token)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


def admitted(cookie: str, token: str) -> Response:
    """The way to the page without a token in its address."""
    response = RedirectResponse("/", 303, HEADERS)
    # not Strict: a link in a letter or a chat leads here from another site
    response.set_cookie(cookie, token, max_age=COOKIE_S, httponly=True, samesite="lax")
    return response


def cookie_name(scope: Scope) -> str:
    """By port, since a browser gives a host's cookies to the servers on all of its ports."""
    _, port = scope.get("server") or ("", 0)
    return f"stream_token_{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_token(host: str, file: Path | None) -> str | None:
    """The token that a server asks for: a file's, or a new one where others can reach the host.

    A file that does not exist is made, for its owner alone to read. With it, links and open pages
    outlive a restart. Raises UserError for a file that holds no token.
    """
    if file is None:
        return None if is_loopback(host) else secrets.token_urlsafe(24)
    if not file.exists():
        token = secrets.token_urlsafe(24)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
            made.write(token + "\n")
        return token
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not TOKEN.fullmatch(text):
        raise UserError(
            f"{file} holds no token; want one line of 16 to 128 letters, digits, - and _, or name "
            "a file that does not exist, and one is made"
        )
    return text


def link(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    name = socket.gethostname() if host in EVERYWHERE else host
    shown = f"[{name}]" if ":" in name else name
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
