"""What a source may be called where others can read it: nothing secret is in these names.

A URL may hold a password, a signature or a token. Messages, logs, metrics, model ids and files
show a source by these functions, and in no other way.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_HUB = "hf:"
_HIDDEN = "***"
_SCHEME = r"[a-z][a-z0-9+.-]*"
_URL = re.compile(rf"{_SCHEME}(?:::|://).*", re.IGNORECASE | re.DOTALL)
_IN_TEXT = re.compile(rf"{_SCHEME}://\S*", re.IGNORECASE)
_LINK = re.compile(rf"::(?={_SCHEME}(?:::|://))", re.IGNORECASE)  # between chained URLs
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_QUERY_IN_TEXT = re.compile(r"[?#]\S.*")
_TOKEN = re.compile(r"\bbearer\s.*|\bhf_\w+", re.IGNORECASE)
_HOST = re.compile(r"(?:\[[^\[\]]*\]|[^:\[\]]*)(?::\d*)?")  # and maybe a port
_SUFFIXES = (".sealed", ".gguf")


def is_url(name: str) -> bool:
    """Whether a name is a URL: ``scheme://...``, or several chained with ``::``."""
    return "://" in name and _URL.fullmatch(name) is not None


def shown(source: str) -> str:
    """A source without user, password, query and fragment. A path has none of these.

    Where a URL is malformed, nothing is shown that may be a part of a password.
    """
    if source.startswith(_HUB):
        owner, slash, rest = _QUERY.sub("", source).partition("/")
        return _HUB + owner.removeprefix(_HUB).rpartition("@")[2] + slash + rest
    if not is_url(source):
        return source
    return "::".join(_link(link) for link in _LINK.split(_QUERY.sub("", source)))


def _link(url: str) -> str:
    """One URL of a chain."""
    scheme, mark, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    host = authority.rpartition("@")[2]
    if not _HOST.fullmatch(host):  # a password with a slash looks like a host with a strange port
        return f"{scheme}{mark}{_HIDDEN}"
    return f"{scheme}{mark}{host}{slash}{path}"


def cleaned(text: str) -> str:
    """The text of another library's error without what may be secret in it."""
    text = _IN_TEXT.sub(lambda match: shown(match[0]), text)
    return _TOKEN.sub(_HIDDEN, _QUERY_IN_TEXT.sub("", text))


def model_id(source: str) -> str:
    """What requests call the model of a source: a file without its folder and its ending.

    A repository of the hub keeps its owner.
    """
    name = shown(source)
    if name.startswith(_HUB):
        return name.removeprefix(_HUB)
    if is_url(name):  # of a chain the first with a path: simplecache:: has none
        name = next(link for link in _LINK.split(name) if "://" in link)
    name = PurePosixPath(name).name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name or "model"
