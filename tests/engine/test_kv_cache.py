"""KVCacheManager alone, against a naive model of it that compares whole prefixes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmengine.engine.kv_cache import BlockTable, KVCacheManager

SIZE = 2


def filled(cache: KVCacheManager, token_ids: list[int], salt: Hashable = None) -> BlockTable:
    """Return a table for the tokens: cached blocks are matched, the others are computed and registered."""
    table = BlockTable(salt)
    cache.match_prefix(table, token_ids)
    assert cache.allocate(table, len(token_ids))
    cache.register(table, token_ids, len(token_ids))
    return table


def matched(cache: KVCacheManager, token_ids: list[int], salt: Hashable = None) -> int:
    """Return how many tokens are found in the cache, without keeping blocks."""
    table = BlockTable(salt)
    num_tokens = cache.match_prefix(table, token_ids)
    cache.free(table)
    return num_tokens


def test_null_block_is_never_handed_out() -> None:
    cache = KVCacheManager(5, SIZE)
    table = BlockTable()
    assert cache.allocate(table, 8)
    assert sorted(table.block_ids) == [1, 2, 3, 4]
    assert cache.num_usable_blocks == 4
    assert not cache.allocate(table, 9)
    assert len(table.block_ids) == 4


def test_pool_needs_a_block_besides_the_null_block() -> None:
    with pytest.raises(ValueError, match="num_blocks=1"):
        KVCacheManager(1, SIZE)


def test_allocate_changes_nothing_when_too_few_are_left() -> None:
    cache = KVCacheManager(4, SIZE)
    first = filled(cache, [1, 2, 3, 4])
    cache.free(first)
    held, other = BlockTable(), BlockTable()
    assert cache.allocate(held, 4)
    assert not cache.allocate(other, 4)
    assert other.block_ids == []
    assert cache.num_used_blocks == 2
    cache.check_integrity([held, other])


@pytest.mark.parametrize(("num_tokens", "num_matched"), [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (9, 8), (20, 8)])
def test_match_leaves_one_token_to_compute(num_tokens: int, num_matched: int) -> None:
    cache = KVCacheManager(20, SIZE)
    prompt = list(range(100, 120))
    cache.free(filled(cache, prompt[:9]))
    assert matched(cache, prompt[:num_tokens]) == num_matched


def test_equal_block_after_another_prefix_is_not_shared() -> None:
    cache = KVCacheManager(20, SIZE)
    first = filled(cache, [1, 2, 7, 7, 7, 7, 0])
    second = filled(cache, [3, 4, 7, 7, 7, 7, 0])
    assert not set(first.block_ids) & set(second.block_ids)
    assert matched(cache, [7, 7, 7, 7, 0]) == 0


def test_salts_separate_and_equal_salts_share() -> None:
    cache = KVCacheManager(20, SIZE)
    plain = filled(cache, [1, 2, 3])
    salted = filled(cache, [1, 2, 3], salt="tenant")
    assert plain.block_ids[0] != salted.block_ids[0]
    assert filled(cache, [1, 2, 3], salt="tenant").block_ids[0] == salted.block_ids[0]
    assert matched(cache, [1, 2, 3], salt="other") == 0
    assert matched(cache, [1, 2, 3], salt=("root", None)) == 0


def test_partial_block_is_not_registered() -> None:
    cache = KVCacheManager(20, SIZE)
    table = BlockTable()
    assert cache.allocate(table, 4)
    cache.register(table, [1, 2, 3, 4], 3)
    assert matched(cache, [1, 2, 3, 4, 5]) == 2


def test_tail_is_reused_before_its_prefix_and_oldest_first() -> None:
    cache = KVCacheManager(7, SIZE)
    old = filled(cache, [1, 2, 3, 4, 5, 6])
    new = filled(cache, [7, 8, 9, 9, 9, 8])
    cache.free(old)
    cache.free(new)
    for num_left in (4, 2, 0):
        assert cache.allocate(BlockTable(), SIZE)  # on purpose never freed
        assert matched(cache, [1, 2, 3, 4, 5, 6, 0]) == num_left
        assert matched(cache, [7, 8, 9, 9, 9, 8, 0]) == 6, "the newer request keeps its blocks"


def test_block_without_content_is_handed_out_before_cached_ones() -> None:
    cache = KVCacheManager(4, SIZE)
    cache.free(filled(cache, [1, 2, 3, 4, 5]))
    assert cache.num_cached_blocks == 2
    assert cache.allocate(BlockTable(), 1)
    assert matched(cache, [1, 2, 3, 4, 5]) == 4


def test_hit_makes_a_block_recent() -> None:
    cache = KVCacheManager(3, SIZE)
    cache.free(filled(cache, [1, 2]))
    cache.free(filled(cache, [3, 4]))
    assert matched(cache, [1, 2, 0]) == 2
    assert cache.allocate(BlockTable(), 1)
    assert matched(cache, [1, 2, 0]) == 2
    assert matched(cache, [3, 4, 0]) == 0


def test_without_caching_nothing_is_found_or_kept() -> None:
    cache = KVCacheManager(9, SIZE, enable_prefix_caching=False)
    table = filled(cache, [1, 2, 3, 4])
    assert matched(cache, [1, 2, 3, 4, 5]) == 0
    cache.free(table)
    assert cache.num_cached_blocks == 0
    assert cache.num_available_blocks == 8


def test_clear_cache_keeps_what_is_used() -> None:
    cache = KVCacheManager(9, SIZE)
    used = filled(cache, [1, 2, 3])
    cache.free(filled(cache, [5, 6, 7]))
    cache.clear_cache()
    assert cache.num_cached_blocks == 0
    assert matched(cache, [5, 6, 7]) == 0
    assert matched(cache, [1, 2, 3]) == 2
    cache.check_integrity([used])


def test_integrity_check_sees_a_lost_reference() -> None:
    cache = KVCacheManager(9, SIZE)
    filled(cache, [1, 2, 3])
    with pytest.raises(AssertionError, match="reference counts"):
        cache.check_integrity([])


@dataclass
class _Holder:
    """One table, as the model sees it."""

    table: BlockTable
    token_ids: list[int]
    blocks: list[int]
    num_computed: int
    num_registered: int
    orphaned: bool = False
    """A prefix of its content was evicted while an equal block of another request stood for it."""


@dataclass
class _Model:
    """The naive model: contents are whole prefixes, (salt, token ids from 0), and the free list is a list."""

    num_blocks: int
    free: list[int] = field(default_factory=list)
    refs: dict[int, int] = field(default_factory=dict)
    content: dict[int, tuple[Hashable, tuple[int, ...]]] = field(default_factory=dict)
    findable: dict[tuple[Hashable, tuple[int, ...]], int] = field(default_factory=dict)


class KVCacheMachine(RuleBasedStateMachine):
    """Match, allocate, register, free and clear in any order; block ids must be the model's, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_blocks = 8
        self.cache = KVCacheManager(self.num_blocks, SIZE)
        self.model = _Model(self.num_blocks, free=list(range(1, self.num_blocks)))
        self.holders: list[_Holder] = []
        self.journal = self.cache.start_journal()
        self.followed: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        """What somebody who is told of changes knows: uid -> salt and whole prefix."""

    @rule(
        salt=st.sampled_from([None, "a"]), token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=9), data=st.data()
    )
    def admit(self, salt: Hashable, token_ids: list[int], data: st.DataObject) -> None:
        table = BlockTable(salt)
        expected: list[int] = []
        for end in range(SIZE, len(token_ids), SIZE):
            block = self.model.findable.get((salt, tuple(token_ids[:end])))
            if block is None:
                break
            expected.append(block)
        assert self.cache.match_prefix(table, token_ids) == len(expected) * SIZE
        assert table.block_ids == expected
        for block in expected:
            self.model.refs[block] = self.model.refs.get(block, 0) + 1
            if block in self.model.free:
                self.model.free.remove(block)
        num_cached = len(expected) * SIZE
        holder = _Holder(table, token_ids, expected, num_cached, len(expected))
        self.holders.append(holder)
        if self._allocate(holder):
            holder.num_computed = data.draw(st.integers(num_cached, len(token_ids)))
            self._register(holder)
        else:
            self._free(holder)

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=3))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        holder.token_ids = holder.token_ids + more
        if self._allocate(holder):
            holder.num_computed = data.draw(st.integers(holder.num_computed, len(holder.token_ids)))
            self._register(holder)
        else:
            holder.token_ids = holder.token_ids[: len(holder.token_ids) - len(more)]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self._free(data.draw(st.sampled_from(self.holders)))

    @rule()
    def clear(self) -> None:
        self.cache.clear_cache()
        for block in self.model.free:
            self._evict(block)

    @invariant()
    def counts_agree(self) -> None:
        self.cache.check_integrity(holder.table for holder in self.holders)
        model = self.model
        assert self.cache.num_available_blocks == len(model.free)
        assert self.cache.num_used_blocks == self.num_blocks - 1 - len(model.free)
        assert self.cache.num_cached_blocks == sum(block in model.content for block in model.free)

    @rule()
    def follow(self) -> None:
        stored, removed = self.journal.take()
        for uid in removed:
            del self.followed[uid]
        for block in stored:
            before = () if block.parent is None else self.followed[block.parent][1]
            self.followed[block.uid] = (block.salt, before + block.token_ids)
        self.assert_findable(list(self.followed.values()))

    @rule()
    def follow_from_now_on(self) -> None:
        self.journal = self.cache.start_journal()
        self.followed = {}
        self.follow()

    def assert_findable(self, contents: list[tuple[Hashable, tuple[int, ...]]]) -> None:
        assert len(set(contents)) == len(contents)
        assert set(contents) == set(self.model.findable)

    def teardown(self) -> None:
        self.follow()
        for holder in list(self.holders):
            self._free(holder)
        self.counts_agree()
        assert self.cache.num_used_blocks == 0

    def _allocate(self, holder: _Holder) -> bool:
        missing = -(-len(holder.token_ids) // SIZE) - len(holder.blocks)
        enough = missing <= len(self.model.free)
        assert self.cache.allocate(holder.table, len(holder.token_ids)) == enough
        for _ in range(missing if enough else 0):
            block = self.model.free.pop(0)
            self._evict(block)
            self.model.refs[block] = 1
            holder.blocks.append(block)
        assert holder.table.block_ids == holder.blocks
        return enough

    def _register(self, holder: _Holder) -> None:
        self.cache.register(holder.table, holder.token_ids, holder.num_computed)
        while (holder.num_registered + 1) * SIZE <= holder.num_computed:
            block = holder.blocks[holder.num_registered]
            content = (holder.table.salt, tuple(holder.token_ids[: (holder.num_registered + 1) * SIZE]))
            if holder.orphaned:
                self.model.content[block] = content
            elif content not in self.model.findable:
                self.model.content[block] = content
                self.model.findable[content] = block
            holder.num_registered += 1

    def _free(self, holder: _Holder) -> None:
        self.holders.remove(holder)
        self.cache.free(holder.table)
        for block in reversed(holder.blocks):
            self.model.refs[block] -= 1
            if not self.model.refs[block]:
                self.model.free.insert(len(self.model.free) if block in self.model.content else 0, block)

    def _evict(self, block: int) -> None:
        """The block's content is gone, and with it the way to everything that continues it."""
        content = self.model.content.pop(block, None)
        if content is None or self.model.findable.get(content) != block:
            return
        salt, prefix = content
        for other in list(self.model.findable):
            if other[0] == salt and other[1][: len(prefix)] == prefix:
                del self.model.findable[other]
        for holder in self.holders:
            registered = tuple(holder.token_ids[: holder.num_registered * SIZE])
            if holder.table.salt == salt and registered[: len(prefix)] == prefix:
                holder.orphaned = True


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)
