"""The ``gemloom`` command, and ``python -m gemloom``: ready for Ctrl-C from its first moment."""

import os
import signal
from typing import NoReturn

_INTERRUPTED = 128 + 2


def main() -> None:
    """Run the command line of this process, and end it."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _leave)  # an import that is interrupted is a traceback
    from gemloom.cli import main

    main()


def _leave(*_: object) -> NoReturn:
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
