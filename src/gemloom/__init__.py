"""Gemloom: Gemma 4 and Gemma 3 on your own machine, in Python over ggml.

>>> import gemloom
>>> with gemloom.load("model.gguf") as model:
...     print(model.generate("The capital of France is", max_tokens=16).text)

Importing this package loads no native library; ``load`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemloom import errors
from gemloom.errors import GemloomError

if TYPE_CHECKING:
    from gemloom.adapters.info import AdapterInfo
    from gemloom.engine.engine import Stats
    from gemloom.engine.generation import ChatCompletion, ChatRun, Completion, Run, Usage
    from gemloom.engine.request import Piece
    from gemloom.loading import load, load_async
    from gemloom.model import Model
    from gemloom.options import Options
    from gemloom.sampling.params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "AdapterInfo",
    "ChatCompletion",
    "ChatRun",
    "Completion",
    "GemloomError",
    "Model",
    "Options",
    "Piece",
    "Run",
    "SamplingParams",
    "Stats",
    "Usage",
    "errors",
    "load",
    "load_async",
]
_HOMES = {
    "adapters.info": ("AdapterInfo",),
    "engine.engine": ("Stats",),
    "engine.generation": ("ChatCompletion", "ChatRun", "Completion", "Run", "Usage"),
    "loading": ("load", "load_async"),
    "model": ("Model",),
    "options": ("Options",),
    "sampling.params": ("SamplingParams",),
    "engine.request": ("Piece",),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"gemloom.{home}"), name)
    raise AttributeError(f"module 'gemloom' has no attribute {name!r}")
