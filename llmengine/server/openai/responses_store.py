"""ResponseStore: responses that can be read, continued and deleted later, in a bounded part of this process's RAM."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A finished response and the conversation that led to it, as JSON.

    Attributes:
        response: the response.
        input_items: the items of its conversation, oldest first, those of earlier responses among them.
        output_items: the items of its output.
    """

    response: bytes
    input_items: Sequence[bytes]
    output_items: Sequence[bytes]

    @property
    def size_bytes(self) -> int:
        """Bytes of it all. Responses of one conversation share their earlier items, but each one counts them."""
        return len(self.response) + sum(map(len, self.input_items)) + sum(map(len, self.output_items))


class ResponseStore:
    """Responses by tenant and id. Beyond `max_bytes`, those that were used least recently are forgotten."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._responses: OrderedDict[tuple[str | None, str], StoredResponse] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """Bytes of all stored responses."""
        return self._size_bytes

    def put(self, tenant: str | None, response_id: str, response: StoredResponse) -> None:
        """Store a response, unless it alone exceeds the limit."""
        if response.size_bytes > self._max_bytes:
            return
        self._responses[tenant, response_id] = response
        self._size_bytes += response.size_bytes
        while self._size_bytes > self._max_bytes:
            _, oldest = self._responses.popitem(last=False)
            self._size_bytes -= oldest.size_bytes

    def get(self, tenant: str | None, response_id: str) -> StoredResponse | None:
        """The tenant's response of this id, which is then the one used most recently; None if there is none."""
        found = self._responses.get((tenant, response_id))
        if found is not None:
            self._responses.move_to_end((tenant, response_id))
        return found

    def delete(self, tenant: str | None, response_id: str) -> bool:
        """Forget a response; False if there was none."""
        found = self._responses.pop((tenant, response_id), None)
        if found is None:
            return False
        self._size_bytes -= found.size_bytes
        return True
