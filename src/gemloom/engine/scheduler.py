"""Policy alone: which tokens of which requests the next step computes."""

from __future__ import annotations

from collections import abc

from gemloom.compute.batch import Chunk
from gemloom.engine.request import Request


def plan(running: abc.Sequence[Request], chunk: int, budget: int) -> list[Chunk]:
    """The next step: one row of each request that decodes, and a part of each other's prompt.

    Prompts share ``chunk`` rows evenly, or ``budget`` rows while some request decodes, so that its
    stream does not stall; what a short one leaves over goes to the others. Each gets one row at
    least, so none waits for another's end. Chunks come in the order of their slots, so that a
    graph that is kept serves the same requests again, those with the same adapters side by side.
    """
    decoding = [request for request in running if request.decoding]
    prefilling = sorted(
        (request for request in running if not request.decoding), key=lambda s: s.pending
    )
    left = (min(chunk, budget) if decoding else chunk) - len(decoding)
    chunks = [request.next_chunk(1) for request in decoding]
    for waiting, request in zip(range(len(prefilling), 0, -1), prefilling, strict=True):
        rows = max(1, left // waiting)
        chunks.append(request.next_chunk(rows))
        left -= len(chunks[-1].tokens)
    return sorted(chunks, key=_place)


def _place(chunk: Chunk) -> tuple[list[int], int]:
    return [active.adapter.version for active in chunk.adapters], chunk.slot
