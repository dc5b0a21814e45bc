"""Paged KV cache bookkeeping: what each block holds, which requests refer to it, and what can be reused.

The prefix cache is an exact trie, flattened into one dictionary. The key of a full block's content is (uid of the
content before it, its token ids), and each distinct content has a uid of its own. So two different prefixes can never
be confused, as two with equal hashes could. A freed block keeps its content and stays findable until it is handed out
again. Free blocks are handed out least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from llmengine.engine.block_journal import BlockJournal

_ContentKey = tuple[Hashable, tuple[int, ...]]
"""(uid of the content before the block, or `("root", salt)` at the start; token ids of the block)."""


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one request, in position order. Only `KVCacheManager` fills it.

    Attributes:
        salt: requests share prefix blocks only if their salts (tenant, adapter) are equal.
        block_ids: block_ids[i] holds the KV of positions [i * block_size, (i + 1) * block_size).
        uids: uids of the leading blocks' contents, as far as the prefix cache knows them.
    """

    salt: Hashable = None
    block_ids: list[int] = field(default_factory=list)
    uids: list[int] = field(default_factory=list)

    @property
    def parent(self) -> Hashable:
        """First part of the content key of the first block that the prefix cache does not know yet."""
        return self.uids[-1] if self.uids else ("root", self.salt)


class KVCacheManager:
    """Hands out blocks 1 .. num_blocks - 1 (block 0 is the null block) and reuses equal prefixes. Not thread-safe.

    A block is *used* while a table refers to it, *cached* if none does but its content can still be found, and *free*
    otherwise.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks={num_blocks} must be at least 2: the null block and one to hand out")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        # Unreferenced blocks in the order of being handed out. A prefix hit takes one out of the middle in O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of: dict[_ContentKey, int] = {}
        self._key_of: list[_ContentKey | None] = [None] * num_blocks
        self._uid_of: list[int] = [0] * num_blocks
        self._next_uid = 1
        self._num_cached = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.journal: BlockJournal | None = None

    def start_journal(self) -> BlockJournal:
        """Follow what can be found in the cache, from what can be found now; it costs a little for each block."""
        self.journal = BlockJournal()
        for key, block in sorted(self._block_of.items(), key=lambda item: self._uid_of[item[1]]):
            self.journal.stored(self._uid_of[block], *key)
        return self.journal

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_available_blocks(self) -> int:
        """Blocks that no table refers to, cached ones included."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that no table refers to and whose content can be reused."""
        return self._num_cached

    @property
    def num_used_blocks(self) -> int:
        """Blocks that any table refers to."""
        return self.num_usable_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """Fill an empty table with the blocks of the longest known prefix; return how many tokens they hold.

        At least one token stays uncomputed, since its logits are needed. The table refers to the blocks from now on.
        """
        assert not table.block_ids
        if not self.enable_prefix_caching:
            return 0
        size = self.block_size
        for end in range(size, len(token_ids), size):
            block = self._block_of.get((table.parent, tuple(token_ids[end - size : end])))
            if block is None:
                break
            self._take(block)
            table.block_ids.append(block)
            table.uids.append(self._uid_of[block])
        return len(table.block_ids) * size

    def fork(self, source: BlockTable, table: BlockTable, num_blocks: int) -> None:
        """Have an empty table refer to the first `num_blocks` blocks of another, whose writes are all launched.

        Both requests have the same tokens and salt there. Works without the prefix cache.
        """
        assert not table.block_ids
        for block in source.block_ids[:num_blocks]:
            self._take(block)
            table.block_ids.append(block)
        table.uids = source.uids[:num_blocks]

    def count_lookup(self, num_tokens: int, num_hit_tokens: int) -> None:
        """Add one admitted prompt to the hit-rate counters."""
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_hit_tokens

    def allocate(self, table: BlockTable, num_tokens: int) -> bool:
        """Extend the table to have blocks for positions [0, num_tokens); False, and no change, if too few are left."""
        missing = self.blocks_for(num_tokens) - len(table.block_ids)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            self._forget_content(block)
            self._ref_counts[block] = 1
            table.block_ids.append(block)
        return True

    def register(self, table: BlockTable, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Make those of the table's blocks findable that lie within [0, num_computed_tokens), whose KV is computed."""
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        while (index := len(table.uids)) < num_computed_tokens // size:
            begin = index * size
            key = (table.parent, tuple(token_ids[begin : begin + size]))
            known = self._block_of.get(key)
            if known is None:
                known = table.block_ids[index]
                self._block_of[key] = known
                self._key_of[known] = key
                self._uid_of[known] = self._next_uid
                self._next_uid += 1
                if self.journal is not None:
                    self.journal.stored(self._uid_of[known], *key)
            # If another block holds the content already, go on from its uid, so that both chains become one.
            table.uids.append(self._uid_of[known])

    def num_shared_blocks(self, table: BlockTable) -> int:
        """Number of the table's leading blocks that other tables refer to as well."""
        for index, block in enumerate(table.block_ids):
            if self._ref_counts[block] == 1:
                return index
        return len(table.block_ids)

    def forget(self, table: BlockTable, num_kept_blocks: int) -> None:
        """Make blocks unfindable that only this table refers to, except for its first `num_kept_blocks` blocks."""
        for block in table.block_ids[num_kept_blocks:]:
            if self._ref_counts[block] == 1 and self._key_of[block] is not None:
                self._drop_key(block)

    def free(self, table: BlockTable) -> None:
        """Drop the table's references and empty it. Later blocks are reused sooner, so a prefix outlives its tails."""
        for block in reversed(table.block_ids):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self._num_cached += 1
        table.block_ids.clear()
        table.uids.clear()

    def clear_cache(self) -> None:
        """Forget the content of all blocks that no table refers to."""
        for block in self._free:
            self._forget_content(block)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Assert that reference counts equal the tables' entries, free blocks are unused, and keys match blocks."""
        expected = [0] * self.num_blocks
        for table in tables:
            assert len(set(table.block_ids)) == len(table.block_ids), "a table names a block twice"
            for block in table.block_ids:
                expected[block] += 1
        assert expected == self._ref_counts, "reference counts differ from the tables"
        assert expected[0] == 0, "the null block was handed out"
        assert set(self._free) == {b for b in range(1, self.num_blocks) if expected[b] == 0}, "free list is wrong"
        for key, block in self._block_of.items():
            assert self._key_of[block] == key, "content map and block disagree"
        assert self._num_cached == sum(self._key_of[block] is not None for block in self._free), "cached count is wrong"
        assert len(self._block_of) == sum(key is not None for key in self._key_of), "a block lost its key"

    def _take(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._free[block]
            self._num_cached -= 1
        self._ref_counts[block] += 1

    def _forget_content(self, block: int) -> None:
        """Make an unreferenced block's content unfindable."""
        if self._key_of[block] is not None:
            self._drop_key(block)
            self._num_cached -= 1

    def _drop_key(self, block: int) -> None:
        key = self._key_of[block]
        assert key is not None
        del self._block_of[key]
        self._key_of[block] = None
        if self.journal is not None:
            self.journal.removed(self._uid_of[block])
