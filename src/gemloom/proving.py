"""Try the kernels of this machine: ``python -m gemloom.proving [WITHOUT...]``.

``ggml/trust.py`` starts it and reads what it prints; nobody else has to. A line is a kernel that is
begun, or a kernel, a tab and what is wrong with it. ``WITHOUT`` are subjects that are not tried.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from itertools import chain

from gemloom.ggml import proof
from gemloom.ggml.trust import END
from gemloom.kernels import proof as own

_MOST = 120  # seconds until it ends by itself: whoever started it may be gone


def main(without: Sequence[str]) -> None:
    """Print what every kernel gives."""
    _alone()
    for kernel, agrees in chain(proof.cases(), own.cases()):
        if kernel.partition(" ")[0] not in without:
            print(kernel, flush=True)  # noqa: T201  (before it may end this process)
            print(f"{kernel}\t{_wrong(agrees)}", flush=True)  # noqa: T201
    print(END, flush=True)  # noqa: T201


def _wrong(agrees: Callable[[], bool] | None) -> str:
    if agrees is None:
        return "never used: what some compilers make of it ends the process"
    return "" if agrees() else "gives other results than it should"


def _alone() -> None:
    """Leave no core file, and end some day."""
    if hasattr(signal, "alarm"):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(_MOST)


if __name__ == "__main__":
    main(sys.argv[1:])
