"""What a request may say next: grammars, which ``llguidance`` follows, and budgets for thoughts.

``Grammars`` compiles a JSON schema, a regex, a Lark grammar or a list of tools, and gives each
request a Constraint of its own. Special tokens (control tokens and, for Gemma 4, its markup) come
out only where a grammar names them by id; all else it allows is ordinary text.

Not here: how a token is drawn from what is allowed (``sampling.py``), and how what was said is
read (``chat.py``).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from gemloom.errors import GemloomError, OptionError, RequestError
from gemloom.text import tool_grammar
from gemloom.text.grammar_vocabulary import Vocabulary
from gemloom.text.schemas import Schema, schema_of
from gemloom.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemloom.sequence import Constraint

MAX_SCHEMA = 64 * 1024  # bytes of a schema, or of all tools
MAX_GRAMMAR = 16 * 1024  # bytes of a Lark grammar
MAX_REGEX = 8 * 1024  # bytes of a regex, or of one string in a schema: the cost is quadratic
MAX_DEPTH = 48  # levels of lists and objects in a schema
MAX_REASON = 300  # characters of llguidance's own words in an error
_MAX_LINE = 100
_PICTURE = re.compile(r"\s*(\d+ \|.*|\^+|<non-verbose/>)?")
_GBNF = re.compile(r"^[\w-]+[ \t]*::=", re.MULTILINE)  # how its rules begin
_CACHED = 32  # compiled grammars kept
_THREADS = 2  # that compute masks while the model computes
_USUAL = 0.001  # seconds a step waits for a mask; the rare longer ones are computed beside it
_STACK = 128 * 2**20  # llguidance recurses along chains of rules; bytes are taken only if used
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # tens of milliseconds
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=30_000,  # one or two KB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
# A model that has lost its way writes blanks for ever where JSON allows them.
_BLANKS = r"[ \n\t]{1,64}"

Mask = NDArray[np.bool_]
_T = TypeVar("_T")


class Grammars:
    """Compiles what requests of one model must keep to; any thread may call any method.

    ``n_vocab`` is the length of the masks: the model's, which may exceed the tokenizer's size.

    Each method returns a fresh Constraint. Where its grammar may end, the tokens that end a
    generation are allowed too. With ``thinking`` the model may write one thought before the
    constrained text begins; with ``open`` the prompt has opened that thought already.

    All wait for the compiling, usually milliseconds, at worst a few seconds. All raise
    RequestError, with the reason in one line, for what cannot be compiled or exceeds the bounds
    of this file, and where this model has no markup for thoughts or tool calls. A grammar that
    turns out too complex along the way is a RequestError of ``mask()`` or ``accept()``.
    """

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        tokenizer.needs_text("a grammar")
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        self._lock = threading.Lock()
        self._engine: LLTokenizer | None = None
        self._special: list[int] = []  # known with the engine
        # One compiler: hostile grammars then cost one core at most, and delay no mask.
        self._compiler, self._masks = _DeepPool(1), _DeepPool(_THREADS)
        self._compiled = lru_cache(maxsize=_CACHED)(self._compile)

    def warm(self) -> None:
        """Do now what the first grammar would wait for: one or two seconds of work.

        Nothing else runs in this process meanwhile: llguidance holds the interpreter.
        """
        self._ready()

    def json_object(self, *, thinking: bool = False, open: bool = False) -> Constraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, thinking=thinking, open=open)

    def json_schema(
        self, schema: Schema, *, thinking: bool = False, open: bool = False
    ) -> Constraint:
        """JSON that ``schema`` takes, properties in its order; at most MAX_DEPTH levels deep.

        It is a schema as an object or as its JSON, or a class of pydantic's. A keyword
        that cannot be kept is an error, unlike one that says nothing about the form.
        """
        text = _dump("the schema", schema_of(schema))
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": _BLANKS}
            )
        except ValueError as error:
            raise RequestError(f"the schema cannot be used: {_one_line(str(error))}") from None
        return self._constraint("the schema", grammar, thinking or open, open)

    def regex(self, pattern: str, *, thinking: bool = False, open: bool = False) -> Constraint:
        """Text that ``pattern`` matches in full: Rust's syntax, no look-around."""
        _check_text("the regex", pattern, MAX_REGEX)
        grammar = LLMatcher.grammar_from_regex(pattern)
        return self._constraint("the regex", grammar, thinking or open, open)

    def lark(self, grammar: str, *, thinking: bool = False, open: bool = False) -> Constraint:
        """Text of a grammar in llguidance's form of Lark; ``<[id]>`` stands for a token."""
        _check_text("the grammar", grammar, MAX_GRAMMAR)
        compiled = LLMatcher.grammar_from_lark(grammar)
        try:
            return self._constraint("the grammar", compiled, thinking or open, open)
        except RequestError:
            if not _GBNF.search(grammar):
                raise
            raise RequestError(
                "the grammar looks like GBNF, but Lark as llguidance reads it is what is taken; "
                "python -m llguidance.gbnf_to_lark converts one to the other"
            ) from None

    def tools(
        self,
        declared: Sequence[Mapping[str, Any]],
        choice: str,
        *,
        thinking: bool = False,
        open: bool = False,
    ) -> Constraint:
        """Tool calls in Gemma 4's markup; ``declared`` are tools as OpenAI's API has them.

        ``choice`` is ``"required"`` (one call or more), a function's name (one call of it) or
        ``"auto"``: text as the model likes, in which each call must be of a declared function.

        Arguments come in the order of the chat template, and follow the schema of ``parameters``
        (for ``"auto"``, where the function is ``strict``; else any arguments go): types,
        properties, required, enum, const, anyOf, references, items and their number, lengths of
        strings, small ranges of integers. What else a schema asks for is left to the model.
        """
        plain = json.loads(_dump("the list of tools", declared))
        functions = tool_grammar.callable_functions(plain, choice)
        markers = self._markers("tool calls", "<|tool_call>", "<tool_call|>", '<|"|>')
        strict = {tool["function"]["name"] for tool in plain if tool["function"].get("strict")}
        start = self._calls(functions, strict, markers, many=choice == "required")
        calls = _FreeUntil(start, markers[0]) if choice == "auto" else start()
        return self._thought(calls, open) if thinking or open else calls

    def response_format(
        self, given: Mapping[str, Any], *, thinking: bool = False, open: bool = False
    ) -> Constraint | None:
        """What OpenAI's ``response_format`` asks for; None for plain text."""
        kind = given.get("type") if isinstance(given, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return self.json_object(thinking=thinking, open=open)
        declared = given.get("json_schema") if kind == "json_schema" else None
        if not isinstance(declared, Mapping) or "schema" not in declared:
            raise RequestError(
                'response_format must be {"type": "json_object"}, or of type json_schema with '
                '{"json_schema": {"schema": {...}}}'
            )
        return self.json_schema(declared["schema"], thinking=thinking, open=open)

    def _calls(
        self, functions: Mapping[str, Any], strict: set[str], markers: Sequence[int], many: bool
    ) -> Callable[[], Constraint]:
        """Starts calls of functions (name: schema of its arguments): one, or ``many``.

        A schema that no grammar can keep (say, one that contains itself and so never ends) leaves
        the arguments to the model, but for functions that are ``strict``.
        """
        try:
            return self._starter("the tools", tool_grammar.write(functions, markers, many))
        except RequestError:
            loose = {
                name: schema if name in strict else tool_grammar.ANY_OBJECT
                for name, schema in functions.items()
            }
            if loose == functions:
                raise
            return self._starter("the tools", tool_grammar.write(loose, markers, many))

    def _constraint(self, what: str, grammar: str, thinking: bool, open: bool) -> Constraint:
        body = self._starter(what, grammar)()
        return self._thought(body, open) if thinking else body

    def _thought(self, body: Constraint, started: bool) -> Constraint:
        begin, end = self._markers("thoughts", "<|channel>", "<channel|>")
        inside = np.zeros(self._n_vocab, np.bool_)
        inside[: self._tokenizer.size] = True
        inside[self._special] = False
        inside[end] = True
        return _AfterThought(body, begin, end, inside, started)

    def _starter(self, what: str, grammar: str) -> Callable[[], Constraint]:
        """Gives a Constraint at the grammar's start each time it is called."""
        compiled = self._compiled(what, grammar)
        return lambda: _Matching(compiled.deep_copy(), self._masks, self._n_vocab)

    def _compile(self, what: str, grammar: str) -> LLMatcher:
        return self._compiler.submit(partial(_compile, self._ready(), what, grammar)).result()

    def _ready(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; takes a moment the first time."""
        with self._lock:
            if self._engine is None:
                vocabulary = Vocabulary(self._tokenizer)
                self._special = vocabulary.special_token_ids
                self._engine = LLTokenizer(
                    TokenizerWrapper(vocabulary), eos_token=sorted(self._tokenizer.eog)
                )
            return self._engine

    def _markers(self, purpose: str, *texts: str) -> list[int]:
        found = [self._tokenizer.encode(text, special=True) for text in texts]
        if any(len(ids) != 1 for ids in found):
            raise RequestError(f"this model has no markup for {purpose}: no {', '.join(texts)}")
        return [ids[0] for ids in found]


class ThinkingBudget:
    """Ends thoughts after ``budget`` tokens; lets all else pass. A Constraint.

    ``open`` (None where there is none) and ``close`` are the tokens around a thought; ``started``
    says that the prompt ends inside one. All tokens of thoughts count but these two; when they
    are spent, only ``close`` may follow, at once where another thought begins.
    ``n_vocab`` is the length of the masks. Raises OptionError for a budget below 0.
    """

    finished = False

    def __init__(
        self, close: int, open: int | None, budget: int, started: bool, n_vocab: int
    ) -> None:
        if budget < 0:
            raise OptionError(f"the thinking budget must be 0 or more, is {budget}")
        self._close, self._open, self._left, self._thinking = close, open, budget, started
        self._closing = np.zeros(n_vocab, np.bool_)
        self._closing[close] = True

    def prepare(self) -> None:
        """Nothing: the mask is always at hand."""

    def mask(self) -> Mask | None:
        """Only ``close`` where the budget is spent inside a thought, else all."""
        return self._closing if self._thinking and self._left <= 0 else None

    def accept(self, token: int) -> None:
        """Count the token, if it is of a thought."""
        if not self._thinking:
            self._thinking = token == self._open
        elif token == self._close:
            self._thinking = False
        else:
            self._left -= 1


def both(first: Constraint, second: Constraint) -> Constraint:
    """What ``first`` and ``second`` allow; where that is nothing, what ``first`` allows."""
    return _Both(first, second)


class _Both:
    def __init__(self, first: Constraint, second: Constraint) -> None:
        self._first, self._second = first, second

    @property
    def finished(self) -> bool:
        return self._first.finished or self._second.finished

    def prepare(self) -> None:
        self._first.prepare()
        self._second.prepare()

    def mask(self) -> Mask | None:
        first, second = self._first.mask(), self._second.mask()
        if first is None or second is None:
            return second if first is None else first
        shared = first & second
        return shared if shared.any() else first

    def accept(self, token: int) -> None:
        self._first.accept(token)
        self._second.accept(token)


class _Matching:
    """Keeps to a compiled grammar; the next mask is computed in ``pool``."""

    def __init__(self, matcher: LLMatcher, pool: _DeepPool, n_vocab: int) -> None:
        self._matcher, self._pool, self._n_vocab = matcher, pool, n_vocab
        self._pending: Future[Mask] | None = None
        self.finished = matcher.is_stopped()

    def prepare(self) -> None:
        # Most masks take 0.03 ms. One that is computed beside ggml's threads, which use all cores,
        # makes them wait for each other far longer than that.
        wait([self._next()], timeout=_USUAL)

    def mask(self) -> Mask:
        return self._next().result()

    def _next(self) -> Future[Mask]:
        if self._pending is None:
            self._pending = self._pool.submit(self._compute)
        return self._pending

    def accept(self, token: int) -> None:
        # Also where nobody asked: it may still be reading the state that changes now.
        allowed = None if self._pending is None else self._pending.result()
        self._pending = None
        if not self._matcher.consume_token(token):
            raise self._failure(token, allowed is not None and bool(allowed[token]))
        self.finished = self._matcher.is_stopped()

    def _compute(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)  # without the GIL
        if self._matcher.is_error():
            raise self._too_complex()
        return np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)

    def _failure(self, token: int, allowed: bool) -> GemloomError:
        """Why a token was refused: a limit was met if the mask had allowed it."""
        error = self._matcher.get_error()
        if allowed or "satisfy the grammar" not in error:
            return self._too_complex()
        return GemloomError(f"token {token} does not fit the grammar: pick by the mask")

    def _too_complex(self) -> RequestError:
        reason = _one_line(self._matcher.get_error())
        return RequestError(f"the grammar cannot be followed further: {reason}")


class _AfterThought:
    """``body``, but one thought (``begin``, any tokens of ``inside``, ``end``) may come first."""

    def __init__(self, body: Constraint, begin: int, end: int, inside: Mask, started: bool) -> None:
        self._body, self._begin, self._end, self._inside = body, begin, end, inside
        self._thinking, self._may_begin = started, not started

    @property
    def finished(self) -> bool:
        return not self._thinking and self._body.finished

    def prepare(self) -> None:
        if not self._thinking:
            self._body.prepare()

    def mask(self) -> Mask | None:
        if self._thinking:
            return self._inside
        allowed = self._body.mask()
        if self._may_begin and allowed is not None:
            allowed = allowed.copy()
            allowed[self._begin] = True
        return allowed

    def accept(self, token: int) -> None:
        if self._thinking:
            self._thinking = token != self._end
            return
        self._thinking = self._may_begin and token == self._begin
        self._may_begin = False
        if not self._thinking:
            self._body.accept(token)


class _FreeUntil:
    """Everything, but after ``trigger`` what ``start()`` says, from that token to its end."""

    finished = False

    def __init__(self, start: Callable[[], Constraint], trigger: int) -> None:
        self._start, self._trigger = start, trigger
        self._held: Constraint | None = None

    def prepare(self) -> None:
        if self._held is not None:
            self._held.prepare()

    def mask(self) -> Mask | None:
        return None if self._held is None else self._held.mask()

    def accept(self, token: int) -> None:
        if self._held is None and token == self._trigger:
            self._held = self._start()
        if self._held is not None:
            self._held.accept(token)
            if self._held.finished:
                self._held = None


class _DeepPool:
    """A few threads with room for deep recursion; they end with the pool."""

    _starting = threading.Lock()

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gemloom-grammar")

    def submit(self, call: Callable[[], _T]) -> Future[_T]:
        with self._starting:
            size = threading.stack_size(_STACK)  # for a thread that this submit may start
            try:
                return self._pool.submit(call)
            finally:
                threading.stack_size(size)


def _compile(engine: LLTokenizer, what: str, grammar: str) -> LLMatcher:
    """A matcher at its start, the first mask computed: that finds what can never be said."""
    matcher = LLMatcher(engine, grammar, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise RequestError(f"{what} cannot be used: {_one_line(matcher.get_error())}")
    return matcher


def _one_line(reason: str) -> str:
    """What llguidance says, without its picture of the source; each line cut where it quotes."""
    if "NoExtension" in reason:
        return "it allows no text at all"
    lines = [line.strip() for line in reason.splitlines() if not _PICTURE.fullmatch(line)]
    short = [line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}…" for line in lines]
    return " ".join(" ".join(short).split())[:MAX_REASON]


def _check_text(what: str, text: str, most: int) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{what} must be a string, not {type(text).__name__}")
    if len(text) > most:  # at least as many bytes
        raise RequestError(f"{what} has {len(text):,} bytes or more: {most:,} is the most")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{what} has a lone surrogate, which is no Unicode text") from None
    if size > most:
        raise RequestError(f"{what} has {size:,} bytes: {most:,} is the most")


def _dump(what: str, value: Any) -> str:
    """``value`` as JSON, its size and depth checked."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        _check_text(what, text, MAX_SCHEMA)
        level = [json.loads(text)]
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is no valid JSON: {_one_line(str(error))}") from None
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return text
        for child in level:
            if isinstance(child, str):
                _check_text(f"a string in {what}", child, MAX_REGEX)
    raise RequestError(f"{what} is nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()
