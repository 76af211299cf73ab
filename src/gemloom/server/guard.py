"""Who may ask, and how much they may send."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request

from gemloom.server.errors import BodyTooLargeError, ForbiddenError, KeyRefusedError, OverdueError

BODY_SILENCE = 30.0  # seconds that a client may send nothing of a body it has begun
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")  # what proxies add, if they do
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d*)?", re.ASCII)  # and maybe a port


class Keys:
    """The API keys a server takes; none: it takes every request. They are never shown."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, request: HTTPConnection) -> None:
        """KeyRefusedError unless the request has one of the keys; the time it takes tells none."""
        if not self._digests:
            return
        given = _digest(_given_key(request))
        matches = [compare_digest(given, digest) for digest in self._digests]  # all of them, always
        if not any(matches):
            raise KeyRefusedError("no API key of this server: send Authorization: Bearer KEY")


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()  # one length for all


def _given_key(request: HTTPConnection) -> bytes:
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
    return given.encode("latin-1")  # the bytes as they came


def check_origin(request: HTTPConnection, allowed: Sequence[str]) -> None:
    """ForbiddenError for a web page of another site, where no key would stop it.

    A browser lets any page post to a server on this machine; it only hides the answer.
    """
    origin = request.headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return
    try:
        own = urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:  # no URL at all
        own = False
    if not own:
        raise ForbiddenError("pages of other sites may not use this server: start it with --cors")


def check_host(request: HTTPConnection, names: Sequence[str]) -> None:
    """ForbiddenError where the Host header has none of these names; without any, all will do.

    A site may let its own name mean this machine (DNS rebinding): then its pages are no other
    site's to a browser, and Origin and Host agree. The name it was asked by still is the site's.
    """
    if not names:
        return
    host = request.headers.get("host", "")
    name = _HOST.fullmatch(host)
    if name is None or (name[1] or name[2]).lower() not in names:
        raise ForbiddenError(
            f"the host {host[:80]!r} is not served here, only {', '.join(names)}: "
            "for another name start it with an --api-key"
        )


def site_name(origin: str) -> str | None:
    """The name in an origin such as "https://chat.example:8443"; None where it has none."""
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None


def is_local(request: HTTPConnection) -> bool:
    """Whether the client is on this machine. One that a proxy speaks for may be anywhere."""
    if any(name in request.headers for name in _FORWARDED):
        return False
    try:
        return request.client is not None and ip_address(request.client.host).is_loopback
    except ValueError:
        return False


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most ``limit`` bytes; no more is ever kept.

    BodyTooLargeError, and OverdueError where no part of it comes for ``BODY_SILENCE``.
    """
    return bytes(await read_buffer(request, limit))


async def read_buffer(request: Request, limit: int) -> bytearray:
    """As ``read_body``, without a copy: nobody is answered while a large one is made."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLargeError(f"the body has {int(declared):,} bytes; {limit:,} is the most")
    data, parts = bytearray(), request.stream()
    while (part := await _next(parts)) is not None:
        data += part
        if len(data) > limit:
            raise BodyTooLargeError(f"the body has more than {limit:,} bytes")
    return data


async def _next(parts: AsyncIterator[bytes]) -> bytes | None:
    """The next part of a body; None at its end."""
    try:
        async with asyncio.timeout(BODY_SILENCE):
            return await anext(parts, None)
    except TimeoutError:
        raise OverdueError(f"the body stopped coming for {BODY_SILENCE:g} seconds") from None
