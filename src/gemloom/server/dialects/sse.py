"""Server-sent events: the framing of answers that are streamed so."""

from __future__ import annotations

import json

from gemloom.server.fields import Json


class ServerSent:
    """Writes the events of an answer; those with a type are named by it."""

    media_type = "text/event-stream"
    beat = b": keep-alive\n\n"
    done = b""

    def encode(self, event: Json) -> bytes:
        """One server-sent event."""
        name = f"event: {event['type']}\n" if "type" in event else ""
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return f"{name}data: {data}\n\n".encode()
