"""The tokenizer of a model file, and what stands for it where a file has no vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NoReturn

from gemloom.errors import ConfigError, RequestError, TokenizerError
from gemloom.files.gguf import Metadata
from gemloom.text import vocabulary
from gemloom.text.tokenizer import Tokenizer

_log = logging.getLogger("gemloom.text")


def read_tokenizer(metadata: Metadata, rows: int) -> Tokenizer:
    """The tokenizer of a file with ``rows`` embeddings. Where it contradicts itself is logged."""
    if vocabulary.is_absent(metadata):
        return NoVocabulary(metadata, rows)
    tokenizer = Tokenizer(metadata, rows)
    for note in tokenizer.notes:
        _log.warning("%s", note)
    return tokenizer


class NoVocabulary(Tokenizer):
    """Takes ids and gives ids: each token's text is empty, and all that needs text is refused.

    ``rows`` is the number of ids. The ends of a generation are the ids that the file names.
    """

    def __init__(self, metadata: Metadata, rows: int) -> None:
        self._name = metadata.name
        self.size, self.bos, self.eos = rows, -1, -1  # a prompt of ids has the BOS it is given
        try:
            self.eog = frozenset(vocabulary.end_ids(metadata, rows))
            self.suppress = frozenset(vocabulary.ids(metadata, "suppress_tokens", rows))
        except ConfigError as error:
            raise TokenizerError(str(error)) from None
        self.turn = self.chat_template = self.tool_template = None
        self.openers, self.hidden, self.longest, self.notes = frozenset(), frozenset(), 0, ()

    def needs_text(self, what: str) -> NoReturn:
        """RequestError, always."""
        raise RequestError(f"{self._name} has no vocabulary: {what} needs one; give token ids")

    def pieces(self, text: str, special: bool = False, *, guard: str = "") -> NoReturn:
        """RequestError, and ``encode`` with it."""
        self.needs_text("a text")

    def decode(self, ids: Sequence[int], special: bool = False) -> NoReturn:
        """RequestError."""
        self.needs_text("a text of ids")

    def token(self, token: int) -> NoReturn:
        """RequestError."""
        self.needs_text("the text of a token")

    def id_of(self, text: str) -> int | None:
        """None: no token has a text."""
        return None

    def _visible(self, token: int, special: bool) -> bytes:
        return b""
