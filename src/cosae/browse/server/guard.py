"""Who may ask the server for what, and what a browser may do with an answer.

The server shows what lies on this machine and runs a model, so no page of another origin may use it: a foreign Host
header is refused (DNS rebinding), and so is a POST from another origin. Every answer forbids scripts and styles that
are not ours, frames, and requests to anywhere else.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 2**20
"""A request's body."""
_OURS = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'"
)
POLICY = f"{_OURS}; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Guard:
    """The application behind it, and the host that the server was told to listen on."""

    app: ASGIApp
    host: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope["method"], Headers(scope=scope))

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        app = self.app if refused is None else JSONResponse({"error": refused[1]}, refused[0])
        await app(scope, receive, answered)

    def _refused(self, method: str, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence of a request that is not answered."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 421, "This server answers only to its own address, such as localhost or 127.0.0.1."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "This server answers GET and POST."
        if method == "POST":
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
            if (origin is not None and origin != f"http://{host}") or site not in ("same-origin", "none"):
                return 403, "Another page may not write here."
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return 415, "What is sent must be application/json."
            length = headers.get("content-length", "")
            if not length.isascii() or not length.isdigit() or int(length) > MOST_BYTES:
                return 413, f"What is sent must say its length, of at most {MOST_BYTES:,} bytes."
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server: a name that another's DNS could lead here does not."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == "localhost" or name == self.host.lower():
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
