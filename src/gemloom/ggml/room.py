"""Memory on one device for the inputs of whichever graph is to be computed."""

from __future__ import annotations

from typing import Any

import ggml

from gemloom.errors import OutOfMemoryError


class Room:
    """One buffer, which is kept from graph to graph and grows. Free with ``close()``."""

    def __init__(self, name: str, buffer_type: Any) -> None:
        """``name`` is the device's."""
        self._name, self._type = name, buffer_type
        self.buffer: Any = None
        self.nbytes = 0

    def size_of(self, tensor: Any) -> int:
        """Bytes between ggml's ``tensor`` and what comes after it."""
        size = int(ggml.ggml_backend_buft_get_alloc_size(self._type, tensor))
        alignment = int(ggml.ggml_backend_buft_get_alignment(self._type))
        return -(-size // alignment) * alignment

    def take(self, size: int) -> int:
        """Where so many bytes begin. What was there before is gone. OutOfMemoryError."""
        if size > self.nbytes:
            self.close()
            self.buffer = ggml.ggml_backend_buft_alloc_buffer(self._type, size)
            if not self.buffer:
                raise OutOfMemoryError(
                    f"no memory on {self._name} for the inputs of a step; "
                    "take a smaller chunk or fewer gpu_layers"
                )
            self.nbytes = int(ggml.ggml_backend_buffer_get_size(self.buffer))
        return int(ggml.ggml_backend_buffer_get_base(self.buffer))

    def close(self) -> None:
        """Free the buffer."""
        if self.buffer:
            ggml.ggml_backend_buffer_free(self.buffer)
        self.buffer, self.nbytes = None, 0
