"""What ``gemloom chat`` and the model have said: prompts from it, to a file and back.

Nothing here reads or writes the terminal.
"""

import json
import os
from pathlib import Path
from typing import Any

from gemloom.engine.generation import ChatRun
from gemloom.errors import RequestError
from gemloom.files.caching import write_whole
from gemloom.model import Model

Message = dict[str, str]


class SavedChat:
    """Messages in turn, an optional system message first; the last one is an answer.

    ``params`` are sampling options as ``Model.chat`` takes them.
    """

    def __init__(self, model: Model, params: dict[str, Any], system: str | None = None) -> None:
        self._model, self._params = model, params
        self._system = [_message("system", system)] if system else []
        self.messages: list[Message] = [*self._system]
        self._own: Path | None = None  # the file that it was saved to, or comes from

    def ask(self, text: str) -> ChatRun:
        """Start an answer; nothing of it is kept yet. Raises what ``Model.chat`` raises."""
        messages = [*self.messages, _message("user", text)]
        return self._model.chat(messages, stream=True, **self._params)

    def keep(self, text: str, answer: str) -> None:
        """Take note of a message and its answer, both or, where nothing was said, neither."""
        if answer:
            self.messages += [_message("user", text), _message("assistant", answer)]

    def reset(self) -> str:
        """Forget all but the system message. Returns a line that says so."""
        self.messages = [*self._system]
        return "a new conversation"

    def save(self, path: Path) -> str:
        """Write the messages as JSON, whole or not at all. Returns a line that says so.

        Raises RequestError where the file cannot be written, or is there and is not the one that
        this conversation was saved to or loaded from.
        """
        if os.path.lexists(path) and path.absolute() != self._own:
            raise RequestError(f"{path}: already exists; name another file, or remove it")
        try:
            write_whole(path, json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror or error}") from error
        self._own = path.absolute()
        return f"{len(self.messages)} messages written to {path}"

    def load(self, path: Path) -> str:
        """Go on with the messages of a file, its system message too. Returns a line that says so.

        Raises RequestError, with nothing changed, where the file does not hold a conversation.
        """
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deep
            raise RequestError(f"{path}: not JSON: {error}") from None
        _check(path, messages)
        self.messages = messages
        self._system = [message for message in messages if message["role"] == "system"]
        self._own = path.absolute()
        return f"{len(messages)} messages read from {path}"


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _check(path: Path, messages: Any) -> None:
    """RequestError unless these are messages as ``save`` writes them."""
    if not isinstance(messages, list):
        raise RequestError(f"{path}: not a list of messages")
    offset = (
        bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    )
    for index, message in enumerate(messages):
        wanted = "system" if offset and not index else ("user", "assistant")[(index - offset) % 2]
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise RequestError(f"{path}: message {index + 1} is not an object of role and content")
        if message["role"] != wanted:
            raise RequestError(f"{path}: message {index + 1} should have the role {wanted}")
        if not isinstance(message["content"], str):
            raise RequestError(f"{path}: the content of message {index + 1} is not a string")
    if (len(messages) - offset) % 2:
        raise RequestError(f"{path}: the last message is not answered")
