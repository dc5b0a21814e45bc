"""Server-sent events, parsed incrementally."""

from __future__ import annotations

from llmengine.load_test.records import RequestFailure

_MAX_EVENT_BYTES = 16 << 20


class SseParser:
    """The data of server-sent events, whatever the pieces are in which their bytes arrive."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """Data of the events that this piece completes; several lines of data of one event are joined.

        Raises `RequestFailure` for an event of more than 16 MiB.
        """
        *lines, self._rest = (self._rest + piece if self._rest else piece).split(b"\n")
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise RequestFailure("not OpenAI", f"a line of more than {_MAX_EVENT_BYTES} bytes in the stream")
        events: list[bytes] = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif line in (b"", b"\r") and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events
