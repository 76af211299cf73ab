"""A server's backend without a model: its answers say what a test has them say, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np

import vocabularies
from gemloom.adapters.info import AdapterInfo, Scales
from gemloom.engine.engine import Stats
from gemloom.engine.generation import Inbox, Run
from gemloom.engine.request import Piece, Request
from gemloom.errors import GemloomError, UnknownAdapterError
from gemloom.text.compose import Composed, Composer
from gemloom.text.constraint import Grammars


class FakeAnswer:
    """An answer under way; any thread may have it say something."""

    def __init__(self, request: Request, inbox: Inbox, adapters: Scales | None) -> None:
        self.request, self.adapters = request, adapters
        self._inbox = inbox

    def say(self, text: str, finish_reason: str | None = None) -> None:
        """One more piece; one with a reason is the last."""
        self.request.n_generated += 1
        self._inbox.put(Piece(text, 0, finish_reason=finish_reason))

    def fail(self, error: Any) -> None:
        """End it with an error."""
        self._inbox.put(error)

    def cancel(self, request: Request) -> None:
        """What the server does where nobody waits any more."""
        request.cancelled = True
        self._inbox.put(None)

    @property
    def cancelled(self) -> bool:
        return self.request.cancelled


class FakeAdapters:
    """Adapters by name that do nothing."""

    def __init__(self) -> None:
        self._named: dict[str, AdapterInfo] = {}

    def load(self, name: str, source: Any, scale: float = 1.0) -> AdapterInfo:
        self._named[name] = AdapterInfo(
            name=name, version=1, scale=scale, rank=1, matrices=1, nbytes=0, norm=0.0, ignored={},
            invocation=(), users=0, requests=0,
        )  # fmt: skip
        return self._named[name]

    def unload(self, name: str) -> None:
        self.check(name)
        del self._named[name]

    def list(self) -> list[AdapterInfo]:
        return list(self._named.values())

    def check(self, name: str) -> None:
        if name not in self._named:
            raise UnknownAdapterError(f"no adapter is named {name!r}")


class FakeConfig:
    n_vocab, n_embd = 300, 4


class FakeBackend:
    """Each answer says ``texts``, a piece each, and ends; without any the test has it speak.

    ``answers`` are those that were started. ``refusal`` is raised in place of the next ones;
    ``error`` is why it has stopped.
    """

    def __init__(self, *texts: str, context: int = 128, slots: int = 2) -> None:
        self.texts, self.context, self.slots = texts, context, slots
        self.answers: list[FakeAnswer] = []
        self.refusal: GemloomError | None = None
        self.error: str | None = None
        self.closed = False
        self.adapters, self.config = FakeAdapters(), FakeConfig()
        self.tokenizer = vocabularies.small("gemma4")

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.tokenizer.size)

    @cached_property
    def composer(self) -> Composer:
        return Composer(self.tokenizer, lambda: self.grammars, self.tokenizer.size, self.context)

    def answer(
        self, composed: Composed, adapters: Scales | None = None, after: Run | None = None
    ) -> Run:
        if self.refusal:
            raise self.refusal
        inbox = Inbox()
        prompt = [int(token) for token in composed.prompt]
        request = Request(prompt, composed.params, self.tokenizer, inbox.put)
        answer = FakeAnswer(request, inbox, adapters)
        for text in self.texts:
            answer.say(text)
        if self.texts:
            answer.say("", "stop")
        self.answers.append(answer)
        return Run(request, inbox, answer.cancel, self)

    def embed(self, text: str | Sequence[int], adapters: Scales | None = None) -> np.ndarray:
        return np.array([1, 0, 0, 0], np.float32)

    def stats(self) -> Stats:
        names = (field.name for field in fields(Stats))
        counts: dict[str, Any] = dict.fromkeys(names, 0)
        return Stats(**counts | {"slots": self.slots, "error": self.error, "lost": False})

    def memory(self) -> dict[str, int]:
        return {"kv_full": 0, "kv_sliding": 0}

    def save_state(self) -> bytes:
        return b"state"

    def load_state(self, data: bytes) -> int:
        return len(data)

    def close(self) -> None:
        self.closed = True
