"""The bytes of one file, wherever they are: in buffers, fetched by block, or still arriving.

Not a loader: nothing here opens, maps or asks anybody for anything (``source.py`` does).
"""

import mmap
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock

from gemloom.errors import FormatError

_KEPT = 12  # blocks of a Blocks, so that neighbouring tensors read the one they share once


@dataclass(frozen=True, slots=True)
class Origin:
    """A file on this machine, as it was when it was opened."""

    path: str
    size: int  # bytes
    mtime_ns: int


class Mapping(mmap.mmap):
    """A file, or the end of one, that was mapped here: read-only, and nobody else's."""

    def drop(self, start: int, length: int) -> None:
        """Hold the pages within these bytes no more; whoever reads them gets them again."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + length) // page * page
        if first < last and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self.madvise(mmap.MADV_DONTNEED, first, last - first)


class Blob:
    """A read-only run of bytes made of one or more buffers, cut anywhere.

    ``name`` says where the bytes come from and opens every error message about them; ``origin`` is
    the one file that they are all of, if they are.
    """

    readers: int | None = None  # reads at once that pay; None: one a core. 1: in order only
    first_look = 32 << 20  # bytes; every header that is known fits

    def __init__(
        self, name: str, parts: Sequence[memoryview], origin: Origin | None = None
    ) -> None:
        self.name, self.origin = name, origin
        self.parts = [part.cast("B").toreadonly() for part in parts]
        self._ends = list(accumulate(part.nbytes for part in self.parts))

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._ends[-1] if self._ends else 0

    @property
    def cut(self) -> bool:
        """Whether it came in parts, which may have been put in the wrong order."""
        return len(self.parts) > 1

    def reaches(self, end: int) -> bool:
        """Whether there are ``end`` bytes; a stream, which cannot know, says yes."""
        return end <= self.size

    def head(self, length: int) -> memoryview:
        """The first ``length`` bytes, or all there are."""
        return self.view(0, min(length, self.size))

    def view(self, offset: int, length: int) -> memoryview:
        """``length`` bytes from ``offset``: in place where one buffer holds them all, else a copy.

        Raises FormatError where the file ends before.
        """
        joined, at = memoryview(b""), 0
        for piece in self.pieces(offset, length):
            if piece.nbytes == length:
                return piece
            joined = joined or memoryview(bytearray(length))  # a bytearray would copy each piece
            joined[at : at + piece.nbytes] = piece
            at += piece.nbytes
            del piece  # a stream waits for its next part meanwhile
        return joined

    def pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        """The same bytes one buffer after the other, none of them copied."""
        self._check(offset, length)
        index = bisect_right(self._ends, offset)
        while length:
            part = self.parts[index]
            start = offset - (self._ends[index] - part.nbytes)
            piece = part[start : start + length]
            offset, length, index = offset + piece.nbytes, length - piece.nbytes, index + 1
            if piece.nbytes:
                yield piece

    def drop(self, offset: int, length: int) -> None:
        """These bytes are not wanted soon: of files that we mapped, hold their pages no more."""
        for part, end in zip(self.parts, self._ends, strict=True):
            begin = end - part.nbytes
            first, last = max(offset, begin), min(offset + length, end)
            if first < last and isinstance(part.obj, Mapping):
                skipped = len(part.obj) - part.nbytes  # a part is the end of its mapping
                part.obj.drop(skipped + first - begin, last - first)

    def in_memory(self, offset: int, length: int) -> list[memoryview]:
        """The buffers with these bytes, none of them copied; empty where they are not there yet."""
        return list(self.pieces(offset, length)) if self.parts else []

    def locate(self, offset: int, length: int) -> tuple[memoryview, int] | None:
        """The part that holds all these bytes, and where in it they start; None if cut."""
        index = bisect_right(self._ends, offset)
        if length == 0 or offset + length > self.size or offset + length > self._ends[index]:
            return None
        return self.parts[index], offset - (self._ends[index] - self.parts[index].nbytes)

    def finish(self, end: int, alignment: int) -> None:
        """No more is wanted, of what is used up to byte ``end`` and padded to ``alignment``."""

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError(
                f"{self.name}: truncated: {offset + length:,} bytes needed, {self.size:,} there"
            )


class Blocks(Blob):
    """Bytes that are had block by block, when they are asked for: a URL's, a sealed file's.

    ``fetch(index)`` gives a whole block, the last one shorter; it is called by several threads,
    but for one block only once while that is among the last few. ``below``: what it reads from.
    """

    def __init__(
        self,
        name: str,
        size: int,
        block: int,
        fetch: Callable[[int], bytes],
        below: Blob | None = None,
    ) -> None:
        super().__init__(name, [])
        self._size, self.block, self._fetch, self._below = size, block, fetch, below
        self.readers = below.readers if below else None
        self._kept: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = Lock()
        self.first_look = block
        self.fetched = 0  # bytes so far

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self._size

    def pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        """``length`` bytes from ``offset``, block by block."""
        self._check(offset, length)
        while length:
            index, start = divmod(offset, self.block)
            piece = memoryview(self._get(index))[start : start + length]
            offset, length = offset + piece.nbytes, length - piece.nbytes
            yield piece

    def locate(self, offset: int, length: int) -> None:
        """None: nothing stays where it could be used in place."""

    def finish(self, end: int, alignment: int) -> None:
        """Let go of the blocks that were kept."""
        with self._lock:
            self._kept.clear()
        if self._below is not None:
            self._below.finish(self._below.size, 1)

    def _get(self, index: int) -> bytes:
        """A block: kept, being fetched by another thread, or fetched here."""
        with self._lock:
            found = self._kept.get(index)
            future: Future[bytes] = found or Future()
            self._kept[index] = future
            self._kept.move_to_end(index)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        if found is None:
            self._fill(index, future)
        return future.result()

    def _fill(self, index: int, future: "Future[bytes]") -> None:
        try:
            data = self._fetch(index)
        except BaseException as error:  # is raised by whoever wants this block
            future.set_exception(error)
            return
        with self._lock:
            self.fetched += len(data)
        future.set_result(data)


class Stream(Blob):
    """Bytes that arrive in parts and are gone once they were used: in order, each once.

    A part is asked for when all before it have been used, and let go of then. The parts' own
    errors come through. Not for several threads.
    """

    readers = 1
    first_look = 1 << 20

    def __init__(self, name: str, parts: Iterator[memoryview]) -> None:
        super().__init__(name, [])
        self._source = parts
        self._waiting: deque[memoryview] = deque()
        self._position = 0  # of the first byte that waits
        self.fetched = 0  # bytes that have arrived

    @property
    def size(self) -> int:
        """Bytes that have arrived so far."""
        return self.fetched

    @property
    def cut(self) -> bool:
        """True: it comes in parts."""
        return True

    def reaches(self, end: int) -> bool:
        """True: how much will come is not known."""
        return True

    def head(self, length: int) -> memoryview:
        """The first ``length`` bytes, or all there are; before any other, and they are not used up.

        Copied, so that a large first part does not stay for the sake of the header in it.
        """
        while self.fetched < length and self._receive():
            pass
        head = bytearray()
        while self._waiting and len(head) < length:
            part = self._waiting.popleft()
            rest = part[length - len(head) :]
            head += part[: length - len(head)]
            if rest.nbytes:
                self._waiting.appendleft(rest)
        self._waiting.appendleft(memoryview(head).toreadonly())
        return self._waiting[0]

    def pieces(self, offset: int, length: int) -> Iterator[memoryview]:
        """``length`` bytes from ``offset``, as they arrive; what lies before them is dropped.

        FormatError where the stream ends before, or has passed ``offset``.
        """
        self._skip(offset)
        end = offset + length
        while self._position < end:
            piece = self._take(end)
            yield piece
            del piece  # the next part is not asked for while this one is held

    def locate(self, offset: int, length: int) -> None:
        """None: nothing stays where it could be used in place."""

    def finish(self, end: int, alignment: int) -> None:
        """FormatError unless the stream ends after ``end`` bytes, or after padding behind them."""
        self._skip(end)
        most = end + -end % alignment
        while self._fill():
            self._position += self._waiting.popleft().nbytes
            if self._position > most:
                raise FormatError(
                    f"{self.name}: goes on after its last tensor, which ends at byte {end:,}: "
                    "a part too many, or one twice"
                )

    def _skip(self, offset: int) -> None:
        if offset < self._position:
            raise FormatError(f"{self.name}: tensors that overlap cannot be loaded from a stream")
        while self._position < offset:
            self._take(offset)

    def _take(self, end: int) -> memoryview:
        """What waits, up to byte ``end``; the next part where nothing does."""
        if not self._fill():
            raise FormatError(
                f"{self.name}: truncated: {end:,} bytes needed, the stream ended after "
                f"{self.fetched:,}: a part is missing"
            )
        part, most = self._waiting.popleft(), end - self._position
        if part.nbytes > most:
            self._waiting.appendleft(part[most:])
        self._position += min(part.nbytes, most)
        return part[:most]

    def _fill(self) -> bool:
        """Wait until something waits to be used; False at the end of the stream."""
        while not self._waiting or not self._waiting[0].nbytes:
            if self._waiting:
                self._waiting.popleft()
            elif not self._receive():
                return False
        return True

    def _receive(self) -> bool:
        part = next(self._source, None)
        if part is None:
            return False
        self._waiting.append(part)
        self.fetched += part.nbytes
        return True
