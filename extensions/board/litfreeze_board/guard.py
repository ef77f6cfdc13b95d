"""Who may ask: everything that comes to the server, pages and WebSockets alike, passes here first."""

import hmac
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any, Optional
from urllib.parse import parse_qsl, urlencode

from litfreeze.local import is_local, place_of

HEADERS = [
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
]
App = Callable[[dict, Callable, Callable], Awaitable[None]]


class Guard:
    """Lets through what comes to this machine by its own name (unless there is a token, which no other site has), from
    a page of this server's, and with the token, if there is one: as `?token=…`, which becomes a cookie, or as that."""

    def __init__(self, app: App, token: Optional[str], port: int) -> None:
        self.app, self.token = app, token
        self.cookie = f"litfreeze-board-{port}"  # cookies are a host's, of all its ports

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(headers):
            await _answer(scope, send, 403, refusal)
            return
        if self.token is not None:
            asked = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
            if scope["type"] == "http" and self._right(asked.pop("token", "")):
                place = scope["path"] + (f"?{urlencode(asked)}" if asked else "")
                cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Lax"
                more = [(b"location", place.encode()), (b"set-cookie", cookie.encode())]
                await _answer(scope, send, 303, "", more)
                return
            if not self._right(_cookies(headers).get(self.cookie, "")):
                told = "This board asks for its token: open the address that litfreeze board printed."
                await _answer(scope, send, 401, told)
                return

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        await self.app(scope, receive, sent)

    def _refusal(self, headers: dict[str, str]) -> str:
        host, origin = headers.get("host", ""), place_of(headers.get("origin"))
        if self.token is None and not is_local(host):
            return "This board answers to localhost alone."
        if origin is not None and origin != host:
            return "This board answers to its own pages alone."
        return ""

    def _right(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _cookies(headers: dict[str, str]) -> dict[str, str]:
    try:
        return {name: cookie.value for name, cookie in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


async def _answer(scope: dict, send: Callable, status: int, text: str, more: list[tuple[bytes, bytes]] = ()) -> None:  # type: ignore[assignment]
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4403})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
