"""From the bytes of a body to a typed request. No name is dropped unseen.

A name is a field of the model, another server's name for one (``other_names.py``), one that asks
for nothing or for what is not done (``fields.py``), or unknown: then ``Ignored`` is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from gemloom.errors import RequestError
from gemloom.server.errors import FieldError
from gemloom.server.fields import IGNORED, NEUTRAL, NO_VALUE, REFUSED, Json, Shape, among
from gemloom.server.ignored import Ignored
from gemloom.server.other_names import OBJECTS
from gemloom.server.protocol import LoraScale, Strict
from gemloom.text.json_size import check_values

_SCALES = TypeAdapter(list[LoraScale])
_Model = TypeVar("_Model", bound=Strict)


def parse(kind: type[_Model], data: bytes, ignored: Ignored | None = None) -> _Model:
    """The request in a JSON body. RequestError or FieldError in one line for anything else.

    ``ignored`` collects the names that nobody knows; where nobody listens they are an error.
    """
    ignored = ignored or Ignored(strict=True)
    value = _json(data)
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    known, called = _known(kind, value, ignored)
    if isinstance(known.get("tools"), list):
        known["tools"] = [tool for tool in known["tools"] if _is_function(tool, ignored)]
    for name, shape in kind.SHAPES.items():
        _look(shape, known.get(name), name, ignored)
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _field_error(error, called) from None


def parse_scales(data: bytes, ignored: Ignored | None = None) -> list[LoraScale]:
    """The list in the body of POST /lora-adapters. RequestError or FieldError."""
    value = _inner(list[LoraScale], _json(data), "scales", ignored or Ignored(strict=True))
    try:
        return _SCALES.validate_python(value)
    except ValidationError:
        raise FieldError("scale", 'the body must be [{"id": 0, "scale": 1.0}, ...]') from None


def _json(data: bytes) -> Any:
    check_values(data)
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None


def _known(kind: type[Strict], value: Json, ignored: Ignored) -> tuple[Json, dict[str, str]]:
    """The model's own fields, and by which name each was given.

    FieldError for what is not done, and for two names of one field with different values.
    """
    known: Json = {}
    called: dict[str, str] = {}
    for name, given in _opened(kind, value).items():
        for field, meant in _meant(kind, name, given, ignored).items():
            if _says_nothing(kind, field, meant):
                continue
            if field in known and known[field] != meant:
                both = f"{called[field]} and {name}"
                raise FieldError(name, f"{both} say different things: send one of them")
            known[field] = meant
            called[field] = name
    return {field: _of(kind, field, given, ignored) for field, given in known.items()}, called


def _opened(kind: type[Strict], value: Json) -> Json:
    """The body with dotted names in place of objects whose fields have other names."""
    opened: Json = {}
    for name, given in value.items():
        if name in OBJECTS and name not in kind.model_fields and isinstance(given, dict):
            opened |= {f"{name}.{key}": inner for key, inner in given.items()}
        else:
            opened[name] = given
    return opened


def _meant(kind: type[Strict], name: str, given: Any, ignored: Ignored) -> Json:
    """What a name and its value say in fields of the model: nothing, one thing or several."""
    if name in kind.model_fields:
        return {name: given}
    if name in IGNORED or given is None or among(given, NO_VALUE.get(name, ())):
        return {}
    if name in kind.OTHER_NAMES:
        return _translated(kind, name, given)
    if name in REFUSED:
        neutral, hint = REFUSED[name]
        if not among(given, neutral):
            raise FieldError(name, f"{name} is not supported: {hint}")
    elif not among(given, NEUTRAL.get(name, ())):
        ignored.add(name, kind.model_fields)
    return {}


def _translated(kind: type[Strict], name: str, given: Any) -> Json:
    try:
        return kind.OTHER_NAMES[name](given)
    except ValueError as error:
        raise FieldError(name, f"{name}: {error}") from None


def _says_nothing(kind: type[Strict], field: str, given: Any) -> bool:
    """Whether a field might as well be missing; a required one never may."""
    if kind.model_fields[field].is_required():
        return False
    return given is None or among(given, NO_VALUE.get(field, ()))


def _of(kind: type[Strict], field: str, given: Any, ignored: Ignored) -> Any:
    return _inner(kind.model_fields[field].annotation, given, field, ignored)


def _inner(annotation: Any, given: Any, path: str, ignored: Ignored) -> Any:
    """A field's value; an object that is read as a model keeps that model's fields alone."""
    model = _model_in(annotation)
    if model is None:
        return given
    if isinstance(given, list):
        return [_inner(model, item, path, ignored) for item in given]
    return _kept(model, given, path, ignored) if isinstance(given, dict) else given


def _model_in(annotation: Any) -> type[Strict] | None:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _kept(model: type[Strict], given: Json, path: str, ignored: Ignored) -> Json:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    kept: Json = {}
    for name, value in given.items():
        if name not in fields:
            if value is not None:
                ignored.add(f"{path}.{name}", fields)
        elif value is not None or fields[name].is_required():
            kept[name] = _inner(fields[name].annotation, value, f"{path}.{name}", ignored)
    return kept


def _look(shape: Shape, given: Any, path: str, ignored: Ignored) -> None:
    """Tell ``ignored`` of keys that neither we nor the model's template know; all stay."""
    if isinstance(given, list):
        for item in given:
            _look(shape, item, path, ignored)
    if not isinstance(given, dict) or not shape:
        return
    for key, inner in given.items():
        if key in shape:
            _look(shape[key], inner, f"{path}.{key}", ignored)
        elif inner not in (None, "", [], {}) and not ignored.read_by_template(key):
            ignored.add(f"{path}.{key}", shape)


def _is_function(tool: Any, ignored: Ignored) -> bool:
    """Whether a tool is one that can be called here, or is so wrong that it must be refused."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if not isinstance(kind, str) or kind == "function":
        return True
    if ignored.strict:
        raise FieldError("tools", f"tools: {kind[:64]!r} tools are not run here: function only")
    ignored.add(f"tools:{kind}")
    return False


def _field_error(error: ValidationError, called: dict[str, str]) -> FieldError:
    """One line for the first field that is wrong; a union is wrong in several ways."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    field = str(errors[0]["loc"][0])
    name = called.get(field, field)
    place = "".join(f"[{part}]" for part in errors[0]["loc"][1:2] if isinstance(part, int))
    ways = dict.fromkeys(
        _said(item["loc"], item["msg"]) for item in errors if item["loc"][0] == field
    )
    return FieldError(name, f"{name}{place}: {', or '.join(list(ways)[:4])}")


def _said(loc: Sequence[int | str], message: str) -> str:
    """pydantic's words, with the field they are about if that is inside another."""
    inner = loc[-1] if len(loc) > 1 and isinstance(loc[-1], str) and loc[-1].isidentifier() else ""
    words = message[0].lower() + message[1:]
    return f"{inner}: {words}" if inner and inner not in ("str", "bool") else words
