"""Try the kernels of this machine: ``python -m gemloom.kernels.proving [WITHOUT...]``.

``ggml/trust.py`` starts it and reads what it prints; nobody else has to. A line is a subject or a
kernel that is begun, or with a tab behind it what is wrong with it. ``WITHOUT`` are subjects that
are not tried.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from itertools import chain

from gemloom.ggml import proof
from gemloom.ggml.trust import END
from gemloom.kernels import proof as own

_MOST = 120  # seconds until it ends by itself: whoever started it may be gone


def main(without: Sequence[str]) -> None:
    """Print what every kernel gives."""
    _alone()
    for subject, cases in chain(proof.subjects(), own.subjects()):
        if subject in without:
            continue
        _say(subject)  # first: whatever comes now may end this process
        if cases is None:
            _say(f"{subject}\tnever used: what some compilers make of it ends the process")
            continue
        for kind, agrees in cases():
            _say(f"{subject} {kind}")
            wrong = "" if agrees() else "gives other results than it should"
            _say(f"{subject} {kind}\t{wrong}")
    _say(END)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _alone() -> None:
    """Leave no core file, and end some day."""
    if hasattr(signal, "alarm"):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(_MOST)


if __name__ == "__main__":
    main(sys.argv[1:])
