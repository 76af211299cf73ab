"""The tokenizer in the form that llguidance asks for."""

from __future__ import annotations

from gemloom.text.tokenizer import Tokenizer


class GrammarVocabulary:
    """All tokens as bytes, which of them are special, and how a text is cut."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.tokens = [tokenizer.token(token) for token in range(tokenizer.size)]
        self.special_token_ids = [
            i for i, token in enumerate(self.tokens) if _is_special(tokenizer, i, token)
        ]
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        """The ids of text that a grammar forces, so that it is cut as the model is used to."""
        return self._encode(text)


def _is_special(tokenizer: Tokenizer, token: int, raw: bytes) -> bool:
    """Whether ordinary text never becomes this token, or the token never becomes text."""
    if token in tokenizer.hidden or not raw:
        return True
    if raw[0] < 0x80 and chr(raw[0]) not in tokenizer.openers:  # most: this is all they cost
        return False
    text = raw.decode(errors="replace")
    if text[0] not in tokenizer.openers:
        return False
    return tokenizer.encode(text, special=True) == [token] != tokenizer.encode(text)
