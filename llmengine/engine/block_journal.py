"""BlockJournal: what the prefix cache gains and loses, for those that follow it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from llmengine.observer import CachedBlock


class BlockJournal:
    """The contents that a lookup in the prefix cache can find, and how they changed since the last `take`.

    A content is findable if all contents before it are. So with a content, all that continue it are lost, even if
    their blocks still hold them. Not thread-safe.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, CachedBlock] = {}
        """uid -> content, parents before their children."""
        self._children: dict[int, set[int]] = {}
        self._stored: dict[int, CachedBlock] = {}
        self._removed: list[int] = []

    @property
    def blocks(self) -> Sequence[CachedBlock]:
        """All findable contents, parents before their children."""
        return tuple(self._blocks.values())

    def stored(self, uid: int, parent: Hashable, token_ids: tuple[int, ...]) -> None:
        """Note a new content; `parent` is the first part of its key in `KVCacheManager`."""
        if isinstance(parent, int):
            if (before := self._blocks.get(parent)) is None:
                return  # its prefix was lost while a request went on from it
            self._children.setdefault(parent, set()).add(uid)
            block = CachedBlock(uid, parent, before.salt, token_ids)
        else:
            assert isinstance(parent, tuple)
            block = CachedBlock(uid, None, parent[1], token_ids)
        self._blocks[uid] = self._stored[uid] = block

    def removed(self, uid: int) -> None:
        """Note that a content can be found no more."""
        if (block := self._blocks.get(uid)) is None:
            return
        if block.parent is not None and (siblings := self._children.get(block.parent)) is not None:
            siblings.discard(uid)
        lost = [uid]
        while lost:
            uid = lost.pop()
            del self._blocks[uid]
            lost.extend(self._children.pop(uid, ()))
            if self._stored.pop(uid, None) is None:
                self._removed.append(uid)

    def take(self) -> tuple[Sequence[CachedBlock], Sequence[int]]:
        """Contents that came since the last call, parents before their children, and uids of those that were lost.

        What came and was lost in between is in neither.
        """
        stored, removed = tuple(self._stored.values()), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed
