"""Loads a model from whatever names or holds it, now (``load``) or awaited (``load_async``)."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from gemloom.files import gguf
from gemloom.files.awaited import AwaitedParts
from gemloom.files.source import DEFAULT_MODEL, resolve
from gemloom.loading.build import build_model
from gemloom.options import from_options

if TYPE_CHECKING:
    from gemloom.model import Model
    from gemloom.models.registry import Architecture


def load(
    source: Any = DEFAULT_MODEL,
    *,
    key: Any = None,
    architecture: Architecture | None = None,
    **options: Any,
) -> Model:
    """Load a model.

    ``source`` is a path, "hf:owner/repo[:file]", a URL, a built-in name, bytes or another buffer,
    a list of paths or buffers that make up one file, an iterator of such parts, or a binary file
    object; ``source.resolve`` says more. ``key`` opens a sealed file: 32 bytes, their base64, or
    the ``Path`` of a file that holds that; else the environment variable GEMLOOM_KEY does.
    ``architecture`` is a forward pass of your own, a subclass of ``gemloom.models``' Gemma3 or
    Gemma4 (docs/forward.md). ``options`` are the fields of ``Options``, such as context, slots,
    threads, device, kv_type and keep: ``help(gemloom.Options)`` has all. Raises SourceError,
    FormatError, ConfigError, TensorError or TokenizerError for a file that cannot be used,
    OptionError, DeviceError.
    """
    checked = from_options(options)  # wrong ones are told before anything is fetched
    file = gguf.read(resolve(source, key=key, forward=True))
    return build_model(file, checked, architecture=architecture)


async def load_async(source: Any = DEFAULT_MODEL, **options: Any) -> Model:
    """As ``load``, without holding up the event loop; ``source`` may be an asynchronous iterator.

    Its parts are awaited in this loop, one after another. Cancelled, it stops at the next part;
    another source is loaded to its end. What was loaded is freed then.
    """
    loop = asyncio.get_running_loop()
    parts = AwaitedParts(source, loop) if hasattr(source, "__aiter__") else None
    given = source if parts is None else parts
    work = loop.run_in_executor(None, partial(load, given, **options))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        if parts is not None:
            parts.stop()
        work.add_done_callback(_discard)
        raise


def _discard(work: asyncio.Future[Model]) -> None:
    """Close a model that nobody waits for any more."""
    if not work.cancelled() and work.exception() is None:
        work.result().close()
