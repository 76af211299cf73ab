"""Memory on one device for the inputs of whichever graph is to be computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ggml

from gemloom.errors import OutOfMemoryError


class Room:
    """One buffer, which is kept from graph to graph and grows. Free with ``close()``."""

    def __init__(self, buffer_type: Any, name: str, check: Callable[[], None]) -> None:
        """``name`` is the device's; ``check`` raises if it was lost."""
        self._type, self._name, self._check = buffer_type, name, check
        self.buffer: Any = None
        self.nbytes = 0

    def size_of(self, tensor: Any) -> int:
        """Bytes between ggml's ``tensor`` and what comes after it."""
        size = int(ggml.ggml_backend_buft_get_alloc_size(self._type, tensor))
        alignment = int(ggml.ggml_backend_buft_get_alignment(self._type))
        return -(-size // alignment) * alignment

    def grow(self, size: int) -> None:
        """Have so many bytes at least, in another buffer if these are more.

        OutOfMemoryError, LostError.
        """
        if size <= self.nbytes:
            return
        self.close()
        self.buffer = ggml.ggml_backend_buft_alloc_buffer(self._type, size)
        self._check()  # one that is lost gives none, or what is none
        if not self.buffer:
            raise OutOfMemoryError(
                f"no memory on {self._name} for the inputs of a step; "
                "take a smaller chunk or context, or fewer slots"
            )
        self.nbytes = int(ggml.ggml_backend_buffer_get_size(self.buffer))

    def close(self) -> None:
        """Free the buffer."""
        if self.buffer:
            ggml.ggml_backend_buffer_free(self.buffer)
        self.buffer, self.nbytes = None, 0
