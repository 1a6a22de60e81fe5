"""The front door: who may come in, how much they may bring and how long they may stay, before anything is parsed."""

import base64
import binascii
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Iterable
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zoo.serve.limits import Limits

API = "/api/"
# What the page and the docs are made of. All other routes of Gradio, which take paths, URLs and files, are closed.
OPEN = re.compile(
    r"/|/theme\.css|/favicon\.ico|/docs|/openapi\.json"
    r"|/(assets|static/(js|img|fonts)|static-offline-docs|samples)/\w[\w.-]*",
    re.ASCII,
)
# Gradio's page has scripts in it, and makes functions of text.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
PATIENCE = 5.0  # seconds that an upload may stand still, at its start and in all
LEAST_RATE = 64 * 2**10  # bytes per second that it must bring on average beyond them
LINGER = 5.0  # seconds that the rest of a refused upload is waited for
DEADLINE = "zoo.deadline"  # key of the scope: when, in time.monotonic(), the request is ended

log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not answered: with a status, and why in one sentence."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Gate:
    """An ASGI middleware.

    Args:
        app: what is behind it.
        limits: what is let in.
        token: without it, as a bearer token or the password of HTTP Basic authentication, nothing is; empty for none.
        hosts: the names by which the server may be called; None for any.
    """

    def __init__(self, app: ASGIApp, limits: Limits, token: str = "", hosts: Iterable[str] | None = None) -> None:
        self.app, self.limits, self._token = app, limits, token.encode()
        self._hosts = None if hosts is None else frozenset(hosts)
        self._uploading = self._admitted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: the page opens none
            await send({"type": "websocket.close", "code": 1008})
            return
        door, receive = _Door(send), _Incoming(receive)
        try:
            self._check(scope)
            if scope["path"].startswith(API) and scope["method"] == "POST":
                await self._admit(scope, receive, door)
            else:
                await self.app(scope, receive, door.send)
        except Refused as refused:
            await receive.skip(2 * self.limits.upload_bytes)
            await door.refuse(refused)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            await door.refuse(Refused(500, "The server failed at this request; its log says why."))

    def _check(self, scope: Scope) -> None:
        """What can be told by the headers."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:  # another site that has its name lead here
            raise Refused(421, f"This server is not called {host!r}.")
        origin = headers.get("origin")
        if origin is not None and scope["method"] == "POST" and urlsplit(origin).netloc != host:
            raise Refused(403, "Pages of other sites may not use this server.")
        if self._token and not hmac.compare_digest(_credential(headers.get("authorization", "")), self._token):
            raise Refused(
                401,
                "A token is needed: send the header 'Authorization: Bearer TOKEN'.",
                **{"www-authenticate": 'Basic realm="zoo, password: the token", charset="UTF-8"'},
            )
        path, method = scope["path"], scope["method"]
        if not path.startswith(API):
            if not OPEN.fullmatch(path):
                raise Refused(404, "There is nothing at this address.")
            if method not in ("GET", "HEAD"):
                raise Refused(405, f"{method} is not allowed here.", allow="GET, HEAD")
            scope["query_string"] = b""  # Gradio finds saved states by it
        elif method == "POST" and _number(headers.get("content-length", "")) > self.limits.upload_bytes:
            raise self._too_large()

    async def _admit(self, scope: Scope, receive: Receive, door: "_Door") -> None:
        """Take a request in, as a whole before anything of it is looked at, and see to it that it leaves in time."""
        limits = self.limits
        scope[DEADLINE] = time.monotonic() + limits.seconds
        with anyio.move_on_after(limits.seconds) as time_left:
            self._uploading += 1
            try:
                if self._uploading > 2 * limits.queue or self._is_full():
                    raise self._busy()
                body = await self._read(receive)
            finally:
                self._uploading -= 1
            if self._is_full():
                raise self._busy()
            self._admitted += 1
            try:
                await self._answer(scope, receive, door, body)
            finally:
                self._admitted -= 1
        if time_left.cancelled_caught:
            raise Refused(504, f"The request took longer than {limits.seconds:g} seconds.")

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        start = time.monotonic()
        while True:
            patience = PATIENCE + len(body) / LEAST_RATE - (time.monotonic() - start)
            with anyio.move_on_after(max(patience, 0)) as waiting:
                message = await receive()
            if waiting.cancelled_caught:
                raise Refused(408, f"The upload was slower than {LEAST_RATE // 2**10} KiB/s.", connection="close")
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.limits.upload_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    async def _answer(self, scope: Scope, receive: Receive, door: "_Door", body: bytes) -> None:
        """Let the app answer, unless the client leaves before."""
        gone = anyio.Event()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch(both: anyio.CancelScope) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            both.cancel()

        failure: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(watch, group.cancel_scope)
            try:
                await self.app(scope, replay, door.send)
            except Exception as error:  # as it is, and not in a group of one
                failure = error
            group.cancel_scope.cancel()
        if failure:
            raise failure

    def _is_full(self) -> bool:
        return self._admitted >= self.limits.queue + self.limits.concurrency

    def _busy(self) -> Refused:
        return Refused(503, "All models are busy and the queue is full: try again.", **{"retry-after": "1"})

    def _too_large(self) -> Refused:
        return Refused(413, f"The request is larger than {self.limits.upload_bytes / 2**20:g} MiB.", connection="close")


class _Incoming:
    """What a client sends."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._ended = receive, False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._ended |= message["type"] == "http.disconnect" or not message.get("more_body")
        return message

    async def skip(self, most: int) -> None:
        """Let the rest of a body pass for a while: who is still sending does not read why it is refused."""
        with anyio.move_on_after(LINGER):
            while not self._ended and most > 0:
                most -= len((await self()).get("body", b""))


class _Door:
    """The way out of one request, on which every answer gets the headers that protect a browser."""

    def __init__(self, send: Send) -> None:
        self._send, self._started = send, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Send an error, unless another answer has begun."""
        if self._started:
            return
        body = json.dumps({"error": refused.reason}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Whether a name or an address to listen on is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()


def _credential(authorization: str) -> bytes:
    """The token of a Bearer header, or the password of a Basic one, which is what browsers can send."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            pass
    return b""


def _number(text: str) -> int:
    """Of a header; the server below has looked at it, and where there is none the bytes are counted."""
    return int(text[:20]) if text.isascii() and text.isdigit() else 0
