"""What the name and the scale of an adapter may be: pure."""

from __future__ import annotations

import re
import reprlib

from gemloom.errors import OptionError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LARGEST = 3.4e38  # of f32, in which it is computed


def check_name(name: object) -> None:
    """OptionError unless it is one that a command line, a URL and JSON can carry as it is."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.strip("."):
        raise OptionError(
            f"an adapter's name is 1 to 64 letters, digits, dots, dashes and underscores, "
            f"not {reprlib.repr(name)}"
        )


def check_scale(name: str, scale: object) -> float:
    """The scale as a number. OptionError where it is none, or not finite."""
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not abs(scale) <= _LARGEST:  # type: ignore[arg-type]
        shown = reprlib.repr(scale)
        raise OptionError(f"the scale of {name} must be a finite number, is {shown}")
    return float(scale)  # type: ignore[arg-type]
