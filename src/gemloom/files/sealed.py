"""Sealed files: encrypted and authenticated, in chunks that can be opened in any order.

The format is drawn in docs/sealed.md. It is the STREAM construction (Hoang, Reyhanitabar,
Rogaway and Vizár, "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", 2015)
over ChaCha20-Poly1305, with a key of its own for each file: a chunk that was altered, moved,
repeated or left out is noticed before a byte of it is used. ChaCha20 and not AES, because it is
quick and constant in time on processors without AES instructions too.

Keys are in no message and in no ``repr``.
"""

from __future__ import annotations

import base64
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gemloom.errors import FormatError, OptionError, SourceError
from gemloom.files.blob import Blob, Blocks, Stream
from gemloom.files.replacing import replaced

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

MAGIC = b"GEMLOOM-SEALED\n"
VERSION = 1
VARIABLE = "GEMLOOM_KEY"
KEY_BYTES, TAG = 32, 16
CHUNK = 1 << 20
HEADER = struct.Struct("<15sBIQ32s7s")  # magic, version, chunk, size, salt, prefix of the nonces
DATA = HEADER.size + TAG  # where the first chunk begins
_MAX_CHUNKS = 1 << 32
_NONCE = struct.Struct(">7sIB")
_MORE, _LAST, _OF_HEADER = range(3)  # the nonce's last byte


@dataclass(frozen=True, slots=True)
class Key:
    """A key of 32 bytes that does not show itself."""

    raw: bytes = field(repr=False)


def read_key(given: Key | str | bytes | os.PathLike[str] | None = None) -> Key | None:
    """A key from its 32 bytes, their base64, or a path: of a file that holds the base64.

    None: that of the environment variable GEMLOOM_KEY, in base64, if there is one. Raises
    OptionError for what is no key, SourceError for a file that cannot be read.
    """
    if given is None:
        text = os.environ.get(VARIABLE)
        return _from_text(text, VARIABLE) if text else None
    if isinstance(given, Key):
        return given
    if isinstance(given, str):
        return _from_text(given, "the key")
    if isinstance(given, os.PathLike):
        return _from_file(os.fspath(given))
    if isinstance(given, bytes) and len(given) == KEY_BYTES:
        return Key(given)
    raise OptionError(f"a key is {KEY_BYTES} bytes, their base64, or the path of a file with that")


def _from_file(path: str) -> Key:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return _from_text(file.read(1024), path)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from error


def _from_text(text: str, where: str) -> Key:
    raw = b""
    with suppress(ValueError):  # its message and trace are not shown: they may quote the key
        raw = base64.b64decode(text.strip(), validate=True)
    if len(raw) != KEY_BYTES:
        raise OptionError(f"{where}: not the base64 of {KEY_BYTES} bytes; gemloom seal --new-key")
    return Key(raw)


def write_new_key(path: Path) -> Key:
    """Make a key and write it to a new file that its owner alone may read.

    SourceError where there is such a file already: a key is never written over.
    """
    key = Key(secrets.token_bytes(KEY_BYTES))
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(number, "wb") as file:
            file.write(base64.b64encode(key.raw) + b"\n")
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; no key was written") from error
    return key


# -- the format ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Format:
    """One sealed file: what its header says, and the cipher with the key made for it."""

    name: str
    header: bytes
    cipher: ChaCha20Poly1305 = field(repr=False)

    @property
    def chunk(self) -> int:
        return int(HEADER.unpack(self.header)[2])

    @property
    def size(self) -> int:
        """Bytes of the plain file."""
        return int(HEADER.unpack(self.header)[3])

    @property
    def count(self) -> int:
        """How many chunks."""
        return -(-self.size // self.chunk)

    def place(self, index: int) -> tuple[int, int]:
        """Where a sealed chunk begins, and its length."""
        length = min(self.chunk, self.size - index * self.chunk)
        return DATA + index * (self.chunk + TAG), length + TAG

    def seal(self, index: int, data: memoryview) -> bytes:
        """A plain chunk sealed."""
        return self.cipher.encrypt(self._nonce(index), data, self.header)

    def open(self, index: int, data: memoryview) -> bytes:
        """A sealed chunk's plain bytes. FormatError where it is not what was sealed there."""
        from cryptography.exceptions import InvalidTag

        try:
            return self.cipher.decrypt(self._nonce(index), data, self.header)
        except InvalidTag:
            raise FormatError(
                f"{self.name}: damaged: chunk {index + 1:,} of {self.count:,} "
                "is not what was sealed"
            ) from None

    def tag(self) -> bytes:
        """What follows the header, and proves that header and key belong together."""
        return self.cipher.encrypt(self._nonce(0, _OF_HEADER), b"", self.header)

    def _nonce(self, index: int, kind: int | None = None) -> bytes:
        prefix = HEADER.unpack(self.header)[5]
        if kind is None:
            kind = _LAST if index == self.count - 1 else _MORE
        return _NONCE.pack(prefix, index, kind)


def _format(name: str, header: bytes, key: Key) -> _Format:
    """The cipher's key is HKDF-SHA-256 of the owner's, with the header's salt."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    salt = HEADER.unpack(header)[4]
    made = HKDF(SHA256(), KEY_BYTES, salt, b"gemloom sealed file").derive(key.raw)
    return _Format(name, header, ChaCha20Poly1305(made))


def is_sealed(blob: Blob) -> bool:
    """Whether a file begins as a sealed one."""
    return blob.head(len(MAGIC)) == MAGIC


def opened(blob: Blob, key: Key) -> Blob:
    """The plain bytes of a sealed file, decrypted as they are asked for.

    SourceError for a key that is not its own. FormatError for a file that is not whole, and later,
    when they are read, for bytes that are not those that were sealed.
    """
    form = _read_header(blob, key)
    if isinstance(blob, Stream):
        return Stream(blob.name, _arriving(blob, form))
    expected = sum(form.place(form.count - 1))
    if blob.size != expected:
        kind = "truncated" if blob.size < expected else "damaged"
        raise FormatError(f"{blob.name}: {kind}: {blob.size:,} bytes, not {expected:,}")

    def fetch(index: int) -> bytes:
        return form.open(index, blob.view(*form.place(index)))

    return Blocks(blob.name, form.size, form.chunk, fetch, below=blob)


def _read_header(blob: Blob, key: Key) -> _Format:
    head = bytes(blob.head(DATA))
    if len(head) < DATA:
        raise FormatError(f"{blob.name}: truncated: the file ends in its header")
    if head[len(MAGIC)] != VERSION:
        raise FormatError(f"{blob.name}: sealed in version {head[len(MAGIC)]}, not {VERSION}")
    form = _format(blob.name, head[: HEADER.size], key)
    if not secrets.compare_digest(form.tag(), head[HEADER.size :]):
        raise SourceError(f"{blob.name}: sealed with another key, or its first bytes are damaged")
    if not form.chunk or not 0 < form.count <= _MAX_CHUNKS:
        raise FormatError(f"{blob.name}: its header gives impossible sizes")
    return form


def _arriving(blob: Stream, form: _Format) -> Iterator[memoryview]:
    for index in range(form.count):
        yield memoryview(form.open(index, blob.view(*form.place(index))))
    blob.finish(sum(form.place(form.count - 1)), 1)


# -- files ---------------------------------------------------------------------------


def seal(plain: Blob, path: Path, key: Key, advance: Callable[[int], None]) -> None:
    """Write a file sealed; ``advance`` is told bytes as they are done. Whole or not at all.

    Raises FormatError for one that is empty or sealed already, OutputError where it cannot be
    written.
    """
    if not plain.size:
        raise FormatError(f"{plain.name}: empty")
    if is_sealed(plain):
        raise FormatError(f"{plain.name}: sealed already")
    salt, prefix = secrets.token_bytes(32), secrets.token_bytes(7)
    header = HEADER.pack(MAGIC, VERSION, CHUNK, plain.size, salt, prefix)
    form = _format(plain.name, header, key)
    with replaced(path) as file:
        file.write(header + form.tag())
        for index in range(form.count):
            length = form.place(index)[1] - TAG
            file.write(form.seal(index, plain.view(index * CHUNK, length)))
            advance(length)


def unseal(blob: Blob, path: Path, key: Key, advance: Callable[[int], None]) -> None:
    """Write the plain bytes of a sealed file. Whole or not at all.

    Raises FormatError for one that is not sealed, and as ``opened`` and ``seal`` do.
    """
    if not is_sealed(blob):
        raise FormatError(f"{blob.name}: not a sealed file")
    plain = opened(blob, key)
    with replaced(path) as file:
        for piece in plain.pieces(0, plain.size):
            file.write(piece)
            advance(piece.nbytes)
