"""What a request may say next by grammars, which ``llguidance`` follows.

``Grammars`` compiles a JSON schema, a regex, a Lark grammar or a list of tools, and gives each
request a Constraint of its own. Special tokens (control tokens and, for Gemma 4, its markup) come
out only where a grammar names them by id; all else it allows is ordinary text.

Not here: bounds that need no grammar (``bounds.py``), how a token is drawn from what is allowed
(``sampling.py``), and how what was said is read (``router.py``).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from gemloom.errors import GemloomError, RequestError
from gemloom.text import markup, tool_grammar
from gemloom.text.bounds import AfterThought, CallsInText, CallsOrForm, Constraint, Mask
from gemloom.text.grammar_vocabulary import GrammarVocabulary
from gemloom.text.schemas import Schema, schema_of
from gemloom.text.tokenizer import Tokenizer
from gemloom.text.tools import check_tools, said

MAX_SCHEMA = 64 * 1024  # bytes of a schema
MAX_TOOLS_SIZE = 1024 * 1024  # bytes of all tools
MAX_TOOLS_GRAMMAR = 256 * 1024  # bytes of their grammar; a longer one leaves out schemas
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
        self._compiled_tools = lru_cache(maxsize=_CACHED)(self._compile_tools)

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
        parallel: bool = True,
        form: Constraint | None = None,
    ) -> Constraint:
        """Tool calls in Gemma 4's markup; ``declared`` are tools as OpenAI's API has them.

        ``choice`` is ``"required"`` (one call or more), a function's name (one call of it) or
        ``"auto"``: text as the model likes, in which each call must be of a declared function.
        With a ``form``, ``"auto"`` is either calls or text that the form allows. Without
        ``parallel`` there is at most one call, and it ends the answer.

        Arguments come in the order of the chat template, and follow the schema of ``parameters``
        (for ``"auto"``, where the function is ``strict``; else any arguments go): types,
        properties, required, enum, const, anyOf, references, items and their number, lengths of
        strings, small ranges of integers. What else a schema asks for is left to the model, and
        so are whole schemas where the grammar of all would exceed MAX_TOOLS_GRAMMAR.
        """
        many = parallel and (choice == "required" or (choice == "auto" and form is not None))
        begin = self._markers("tool calls", markup.CALL)[0]
        declaration = _to_json("the list of tools", declared)
        start = self._starts(self._compiled_tools(declaration, choice, many))
        body: Constraint
        if choice != "auto":
            body = start()
        elif form is None:
            body = CallsInText(start, begin, once=not parallel)
        else:
            body = CallsOrForm(start, begin, form)
        return self.after_thought(body, open) if thinking or open else body

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

    def after_thought(self, body: Constraint, open: bool) -> Constraint:
        """``body``, before which one thought may stand; ``open``: the prompt has begun it."""
        begin, end = self._markers("thoughts", markup.THOUGHT, markup.THOUGHT_END)
        inside = np.zeros(self._n_vocab, np.bool_)
        inside[: self._tokenizer.size] = True
        self._ready()  # it finds the special tokens
        inside[self._special] = False
        inside[end] = True
        return AfterThought(body, begin, end, inside, open)

    def _compile_tools(self, declared: str, choice: str, many: bool) -> LLMatcher:
        """Calls of the tools, declared in JSON, that may be called: one, or ``many``.

        Where a grammar of all schemas would be too long, those of functions that are not
        ``strict`` are left out, or else all. So is a schema that no grammar can keep (say, one
        that contains itself and so never ends), unless its function is ``strict``.
        """
        _check_text("the list of tools", declared, MAX_TOOLS_SIZE)
        _check_depth("the list of tools", declared)
        tools = check_tools(json.loads(declared))
        for text in said([tool["function"].get("parameters") for tool in tools]):
            _check_text("a string in the list of tools", text, MAX_REGEX)
        functions = tool_grammar.callable_functions(tools, choice)
        strict = {tool["function"]["name"] for tool in tools if tool["function"].get("strict")}
        loose = {
            name: schema if name in strict else tool_grammar.ANY_OBJECT
            for name, schema in functions.items()
        }
        markers = self._markers("tool calls", markup.CALL, markup.CALL_END, markup.QUOTE)
        grammar = tool_grammar.write(functions, markers, many)
        if len(grammar) <= MAX_TOOLS_GRAMMAR:
            try:
                return self._compiled("the tools", grammar)
            except RequestError:
                if loose == functions:
                    raise
        grammar = tool_grammar.write(loose, markers, many)
        if len(grammar) > MAX_TOOLS_GRAMMAR:
            free = dict.fromkeys(functions, tool_grammar.ANY_OBJECT)
            grammar = tool_grammar.write(free, markers, many)
        return self._compiled("the tools", grammar)

    def _constraint(self, what: str, grammar: str, thinking: bool, open: bool) -> Constraint:
        body = self._starts(self._compiled(what, grammar))()
        return self.after_thought(body, open) if thinking else body

    def _starts(self, compiled: LLMatcher) -> Callable[[], Constraint]:
        """Gives a Constraint at the grammar's start each time it is called."""
        return lambda: _Matching(compiled.deep_copy(), self._masks, self._n_vocab)

    def _compile(self, what: str, grammar: str) -> LLMatcher:
        return self._compiler.submit(partial(_compile, self._ready(), what, grammar)).result()

    def _ready(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; takes a moment the first time."""
        with self._lock:
            if self._engine is None:
                vocabulary = GrammarVocabulary(self._tokenizer)
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
        raise RequestError(f"{what} has a lone surrogate, which is not Unicode text") from None
    if size > most:
        raise RequestError(f"{what} has {size:,} bytes: {most:,} is the most")


def _dump(what: str, value: Any) -> str:
    """``value`` as JSON; its size, its depth and its strings are checked."""
    text = _to_json(what, value)
    _check_text(what, text, MAX_SCHEMA)
    for string in _check_depth(what, text):
        _check_text(f"a string in {what}", string, MAX_REGEX)
    return text


def _to_json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not valid JSON: {_one_line(str(error))}") from None


def _check_depth(what: str, text: str) -> list[str]:
    """The strings and keys in JSON. RequestError for more than MAX_DEPTH levels."""
    try:
        level = [json.loads(text)]
    except RecursionError as error:
        raise RequestError(f"{what} is not valid JSON: {_one_line(str(error))}") from None
    strings: list[str] = []
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        strings += [child for child in level if isinstance(child, str)]
        if not level:
            return strings
    raise RequestError(f"{what} is nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else ()
