"""Every exception Gemloom raises on purpose.

    GemloomError                  500  internal_error
    ├── WeightsError              500  weights_error        a file that cannot be used
    │   ├── SourceError           500  source_unavailable   the bytes cannot be had
    │   ├── FormatError           500  invalid_gguf         the bytes are no whole, valid GGUF
    │   ├── ConfigError           500  invalid_config       metadata missing, contradictory, unknown
    │   ├── TensorError           500  invalid_tensor       missing, extra, wrong shape, wrong type
    │   └── TokenizerError        500  invalid_tokenizer    vocabulary or template unusable
    ├── RequestError              400  invalid_request      what a caller asked for
    │   ├── AdapterError          400  invalid_adapter      an adapter that cannot be used
    │   ├── UnknownAdapterError   404  adapter_not_found    a name nothing was loaded under
    │   ├── OptionError           400  invalid_option       an option outside its range
    │   ├── ContextError          400  context_length_exceeded
    │   ├── StateError            400  invalid_state        saved state that does not fit this model
    │   └── TooManyValuesError    413  body_too_large       JSON with more values than are read
    ├── OutputError               500  output_error         a file that cannot be written
    ├── DeviceError               500  device_error         a backend missing or of no use here
    │   ├── OutOfMemoryError      507  out_of_memory        a device, or the host, has no room
    │   ├── LostError             503  device_lost          it was there, and is not any more
    │   └── MalformedError        500  device_error         a worker's answer that cannot be
    ├── QueueFullError            429  queue_full           more requests than may wait
    ├── EngineError               503  engine_failed        a step failed; nothing is computed since
    └── ClosedError               503  model_closed         used after close()

The type carries the HTTP status and the code of an API error, so that no other
file decides either. A message is one line: it names the thing, and where there
is something to do, says what.
"""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class GemloomError(Exception):
    """Base of everything here; raised itself only for a broken invariant of our own."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"


class WeightsError(GemloomError):
    """A model file that cannot be used."""

    code = "weights_error"


class SourceError(WeightsError):
    """The bytes of a model cannot be had: no such file, no network, a part missing."""

    code = "source_unavailable"


class FormatError(WeightsError):
    """The bytes are not a whole and valid GGUF, or safetensors, file."""

    code = "invalid_gguf"


class ConfigError(WeightsError):
    """Metadata that is missing, contradictory or of an unknown architecture."""

    code = "invalid_config"


class TensorError(WeightsError):
    """A tensor that is missing, extra, wrongly shaped or of a type that cannot be used."""

    code = "invalid_tensor"


class TokenizerError(WeightsError):
    """A vocabulary or chat template in the file that cannot be used."""

    code = "invalid_tokenizer"


class RequestError(GemloomError):
    """Something a caller asked for that cannot be done."""

    status = 400
    code = "invalid_request"


class AdapterError(RequestError):
    """A LoRA adapter that cannot be used, or not with this model."""

    code = "invalid_adapter"


class UnknownAdapterError(RequestError):
    """A request names an adapter that is not loaded."""

    status = 404
    code = "adapter_not_found"


class OptionError(RequestError):
    """An option whose value is outside its range."""

    code = "invalid_option"


class ContextError(RequestError):
    """More tokens than the context has room for."""

    code = "context_length_exceeded"


class StateError(RequestError):
    """Saved state that is damaged or belongs to another model."""

    code = "invalid_state"


class TooManyValuesError(RequestError):
    """JSON that holds more values than anything here needs."""

    status = 413
    code = "body_too_large"


class OutputError(GemloomError):
    """A file that cannot be written: no such folder, no right to, a full disk."""

    code = "output_error"


class DeviceError(GemloomError):
    """A backend that is missing, was lost or has no memory left."""

    code = "device_error"


class OutOfMemoryError(DeviceError):
    """A device or the host has no memory for something: it may have some for less, or later."""

    status = 507
    code = "out_of_memory"


class LostError(DeviceError):
    """A device that went away, with all that lay there; it may come back."""

    status = 503
    code = "device_lost"


class MalformedError(DeviceError):
    """An answer of a worker that ggml must not see; says what is wrong with it."""


class QueueFullError(GemloomError):
    """More requests wait than the queue holds: try again later."""

    status = 429
    code = "queue_full"


class EngineError(GemloomError):
    """A step of the engine failed, so all its requests did; the model must be loaded again."""

    status = 503
    code = "engine_failed"


class ClosedError(GemloomError):
    """The model was used after ``close()``."""

    status = 503
    code = "model_closed"


def quoted(value: object) -> str:
    """A value as a message quotes it: of a long one both ends."""
    return _SHORT.repr(value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name``; None where none is."""
    return next(iter(get_close_matches(name[:64], list(known), 1)), None)


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What an error about an unknown name ends with: the nearest there is, or else something."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else otherwise
