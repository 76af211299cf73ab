"""Tool calls as a grammar: OpenAI's function schemas to Lark rules for Gemma 4's markup.

A call reads ``<|tool_call>call:NAME{key:<|"|>text<|"|>,count:1}<tool_call|>``: strings in quotes
that are tokens of their own, keys without quotes where ``markup.is_bare`` says so, all else as in
JSON, no blanks. What a schema asks for beyond what Grammars.tools lists is left out: the grammar
then allows more than the schema.

Not here: compiling the rules (``constraint.py``), and reading a call that was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemloom.errors import RequestError, quoted
from gemloom.text.markup import BARE_KEY, QUOTE, is_bare, written_key

ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}}
_MOST_REPEATS = 1024  # larger bounds on lengths and counts are left to the model
_MOST_INTEGERS = 256  # in a range that is spelled out
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_OPTIONAL = re.compile(r"\([^()]*\)(?:[?*]|\{0,\d*\})")
_NEEDED = re.compile(r"\b(?:rule|ref)_\d+")


def callable_functions(tools: Sequence[Mapping[str, Any]], choice: str) -> dict[str, Any]:
    """The functions that may be called by name, each with the schema of its arguments.

    ``tools`` have been checked; ``choice`` is as for ``Grammars.tools``. Raises RequestError where
    the choice leaves none.
    """
    functions = {}
    for function in (tool["function"] for tool in tools):
        if choice not in ("auto", "required", function["name"]):
            continue
        free = choice == "auto" and function.get("strict") is not True
        schema = function.get("parameters", _NO_ARGUMENTS)
        functions[function["name"]] = ANY_OBJECT if free else schema
    if not functions:
        raise RequestError(f"no tool to call is declared (the choice is {quoted(choice)})")
    return functions


def write(functions: Mapping[str, Any], markers: Sequence[int], many: bool) -> str:
    """Lark of a call of one of the functions, or ``many`` one after another.

    ``markers`` are the ids of the tokens that begin and end a call, and of a string's quote.
    """
    return _Writer(markers).text(functions, many)


class _Writer:
    """The rules written so far.

    A method that takes a schema returns an expression for the values it allows; ``root`` is the
    schema that references in it point into. Compound expressions become rules, so that nothing is
    nested, however deep the schema is.
    """

    def __init__(self, markers: Sequence[int]) -> None:
        self._begin, self._end, self._quote = (f"<[{token}]>" for token in markers)
        letters = re.escape(QUOTE)
        self._rules = {
            "any": 'text | NUMBER | "true" | "false" | "null" | any_list | any_object',
            "any_list": '"[" (any ("," any)*)? "]"',
            "any_object": '"{" (key ":" any ("," key ":" any)*)? "}"',
            "text": f"{self._quote} TEXT {self._quote}",
            # The quote spelled in letters would end the string for one who reads the text.
            "TEXT": f"/(?s:.*)/ & ~/(?s:.*){letters}(?s:.*)/",
            "key": "KEY | text",
            "KEY": f"/{BARE_KEY}/",
            "INTEGER": "/-?(0|[1-9][0-9]{0,17})/",
            "NUMBER": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+-]?[0-9]{1,2})?/",
        }
        self._references: dict[tuple[int, str], str] = {}
        self._waiting: list[tuple[str, str, Any]] = []

    def text(self, functions: Mapping[str, Any], many: bool) -> str:
        """The whole grammar: a call of one of the functions, or ``many`` one after another."""
        calls = [
            f"{_literal(f'call:{name}')} {self._arguments(schema)}"
            for name, schema in functions.items()
        ]
        call = f"{self._begin} {self._either(calls)} {self._end}"
        while self._waiting:  # a loop: chains of references can be longer than Python recurses
            name, pointer, root = self._waiting.pop()
            self._rules[name] = self._value(_follow(root, pointer), root)
        endless = _endless(self._rules).intersection(self._references.values())
        self._rules.update(dict.fromkeys(endless, "any"))
        rules = {"start": f"({call})+" if many else call, **self._rules}
        return "\n".join(f"{name}: {body}" for name, body in rules.items())

    def _arguments(self, schema: Any) -> str:
        target = _follow(schema, "#")
        if target.get("type") == "object" or "properties" in target:
            return self._object(target, schema)
        return "any_object"

    def _value(self, schema: Any, root: Any) -> str:
        if not isinstance(schema, Mapping):
            return "any"
        if isinstance(schema.get("$ref"), str):
            return self._reference(schema["$ref"], root)
        if "const" in schema:
            return self._constant(schema["const"])
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._either([self._constant(value) for value in schema["enum"]])
        for key in ("anyOf", "oneOf", "allOf"):
            options = schema.get(key)
            if isinstance(options, list) and options and (key != "allOf" or len(options) == 1):
                return self._either([self._value(option, root) for option in options])
        return self._typed(schema, root)

    def _typed(self, schema: Mapping[str, Any], root: Any) -> str:
        kind = schema.get("type")
        if kind is None and "properties" in schema:
            kind = "object"
        kinds = kind if isinstance(kind, list) and kind else [kind]
        options = [self._of_kind(kind, schema, root) for kind in kinds]
        return self._either([*options, '"null"'] if schema.get("nullable") is True else options)

    def _of_kind(self, kind: Any, schema: Mapping[str, Any], root: Any) -> str:
        match kind:
            case "object":
                return self._object(schema, root)
            case "array":
                return self._array(schema, root)
            case "string":
                return self._string(schema)
            case "integer":
                return self._integer(schema)
            case "number":
                return "NUMBER"
            case "boolean":
                return self._either(['"true"', '"false"'])
            case "null":
                return '"null"'
        return "any"

    def _object(self, schema: Mapping[str, Any], root: Any) -> str:
        properties = schema.get("properties")
        others = schema.get("additionalProperties")
        if not isinstance(properties, Mapping) or (not properties and isinstance(others, Mapping)):
            return self._map(True if "patternProperties" in schema else others, root)
        listed = schema.get("required")
        listed = listed if isinstance(listed, list) else []
        required = {name for name in listed if isinstance(name, str)}
        names = {*properties, *required}
        # From the last to the first: what may stand at the start, and what after another pair.
        first = rest = '""'
        for name in sorted(names, key=_place, reverse=True):
            pair = f"{self._key(name)} {self._value(properties.get(name), root)}"
            skips = (first, rest)
            first, rest = f"{pair} {rest}", f'"," {pair} {rest}'
            if name not in required:
                first, rest = f"{first} | {skips[0]}", f"{rest} | {skips[1]}"
            first, rest = self._rule(first), self._rule(rest)
        return f'"{{" {first} "}}"'

    def _map(self, values: Any, root: Any) -> str:
        if values is False:
            return '"{" "}"'
        if not isinstance(values, Mapping):
            return "any_object"
        pair = f'key ":" {self._value(values, root)}'
        return self._rule(f'"{{" ({pair} ("," {pair})*)? "}}"')

    def _array(self, schema: Mapping[str, Any], root: Any) -> str:
        item = self._value(schema.get("items"), root)
        low, high = _bounds(schema, "minItems", "maxItems", _MOST_REPEATS)
        if high == 0:
            return '"[" "]"'
        more = f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
        items = f'{item} ("," {item}){more}'
        return self._rule(f'"[" {items} "]"' if low else f'"[" ({items})? "]"')

    def _string(self, schema: Mapping[str, Any]) -> str:
        low, high = _bounds(schema, "minLength", "maxLength", _MOST_REPEATS)
        if low == 0 and high is None:
            return "text"
        size = f"{{{low},{'' if high is None else high}}}"
        name = f"TEXT_{low}_{'' if high is None else high}"
        self._rules[name] = f"TEXT & /(?s:.{size})/"
        return f"{self._quote} {name} {self._quote}"

    def _integer(self, schema: Mapping[str, Any]) -> str:
        low, high = schema.get("minimum"), schema.get("maximum")
        if type(low) is int and type(high) is int and 0 <= high - low < _MOST_INTEGERS:
            return self._either([f'"{value}"' for value in range(low, high + 1)])
        return "INTEGER"

    def _constant(self, value: Any) -> str:
        """A value written out."""
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}"
        if isinstance(value, list):
            return " ".join(['"["', ' "," '.join(map(self._constant, value)), '"]"'])
        if isinstance(value, Mapping):
            keys = sorted(value, key=_place)
            pairs = [f"{self._key(key)} {self._constant(value[key])}" for key in keys]
            return " ".join(['"{"', ' "," '.join(pairs), '"}"'])
        return _literal(json.dumps(value))

    def _key(self, name: str) -> str:
        """A key and its colon."""
        if is_bare(name):
            return _literal(f"{name}:")
        return f'{self._quote} {_literal(name)} {self._quote} ":"'

    def _reference(self, pointer: str, root: Any) -> str:
        key = (id(root), pointer)
        if key not in self._references:
            self._references[key] = f"ref_{len(self._references)}"
            self._waiting.append((self._references[key], pointer, root))
        return self._references[key]

    def _either(self, options: Sequence[str]) -> str:
        unique = list(dict.fromkeys(options))
        return unique[0] if len(unique) == 1 else self._rule(" | ".join(unique))

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self._rules)}"
        self._rules[name] = body
        return name


def _endless(rules: Mapping[str, str]) -> set[str]:
    """The rules that no text fits, as each of their options needs such a rule again."""
    needs = {}
    for name, body in rules.items():
        plain = _QUOTED.sub("", body)
        plain = _OPTIONAL.sub("", _OPTIONAL.sub("", plain))  # one may be in another
        needs[name] = [set(_NEEDED.findall(option)) for option in plain.split("|")]
    left, before = set(needs), 0
    while len(left) != before:
        before = len(left)
        for name in (*needs, *reversed(needs)):  # either way: rules are made before and after
            if name in left and any(all(n not in left for n in option) for option in needs[name]):
                left.discard(name)
    return left


def _place(name: str) -> tuple[str, str]:
    """Where a key is among others: templates sort them as they are written, without case."""
    return written_key(name).lower(), name


def _literal(text: str) -> str:
    return json.dumps(text)  # in ASCII: Lark takes not every character as it is


def _bounds(schema: Mapping[str, Any], least: str, most: str, limit: int) -> tuple[int, int | None]:
    """The bounds under those names; 0 and None where there are none, or none that make sense."""
    low, high = schema.get(least, 0), schema.get(most)
    if type(low) is not int or not 0 <= low <= limit:
        low = 0
    if type(high) is not int or not low <= high <= limit:
        return low, None
    return low, high


def _follow(root: Any, pointer: str) -> Mapping[str, Any]:
    """The schema at a JSON pointer (``#/$defs/name``), past all references from there.

    {}, which allows everything, where there is none or where references go round.
    """
    seen = set()
    while pointer not in seen:
        seen.add(pointer)
        if pointer != "#" and not pointer.startswith("#/"):
            return {}
        target = root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            return {}
        if not isinstance(target.get("$ref"), str):
            return target
        pointer = target["$ref"]
    return {}
