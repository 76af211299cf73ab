"""Tools as requests name them, and a strict reader of the calls that a grammar lets through."""

import json
import re


def tool(name, parameters=None, strict=True):
    function = {"name": name, "description": "says no more", "strict": strict}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


class Reader:
    """Reads tool calls strictly; ValueError for what is none."""

    def __init__(self, said):
        self.rest = said

    def take(self, pattern):
        found = re.match(pattern, self.rest, re.DOTALL)
        if not found:
            raise ValueError(f"no {pattern} at {self.rest[:40]!r}")
        self.rest = self.rest[found.end() :]
        return found[found.re.groups]

    def calls(self):
        calls = []
        while self.rest:
            name = self.take(r"<\|tool_call>call:([\w.-]+)")
            calls.append((name, self.value()))
            assert isinstance(calls[-1][1], dict)
            self.take(r"<tool_call\|>")
        return calls

    def value(self):
        if self.rest.startswith('<|"|>'):
            return self.take(r'<\|"\|>(.*?)<\|"\|>')
        if self.rest[0] in "[{":
            return self.many(self.rest[0])
        return json.loads(self.take(r"[^,\]}]+"))

    def many(self, bracket):
        self.take(re.escape(bracket))
        items = []
        while self.rest[0] not in "]}":
            if items:
                self.take(",")
            key = self.take(r"([^:,{}\[\]]+):") if bracket == "{" else None
            items.append((key, self.value()))
        self.take("}" if bracket == "{" else "]")
        return dict(items) if bracket == "{" else [value for _, value in items]
