"""FairQueue: the tenant that was served least is next, and no tenant saves up service that it did not use."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine.engine.fair_queue import FairQueue


@dataclass(eq=False)
class Item:
    tenant: str | None
    rank: float
    number: int
    waiting: bool = True


class Shop:
    """A queue whose items cost one token each unless the test says otherwise."""

    def __init__(self, **weights: float) -> None:
        self.queue: FairQueue[Item] = FairQueue(weights, lambda item: item.waiting)
        self.num_items = 0

    def push(self, tenant: str | None, rank: float = 0.0) -> Item:
        item = Item(tenant, rank, self.num_items)
        self.num_items += 1
        self.queue.push(self.queue.share(tenant), rank, item.number, item)
        return item

    def pop(self, cost: float = 1.0) -> Item:
        item = self.queue.pop()
        item.waiting = False
        self.queue.share(item.tenant).charge(cost)
        return item

    def leave(self, item: Item) -> None:
        item.waiting = False
        self.queue.left(self.queue.share(item.tenant))

    def serve(self, num_items: int, **costs: float) -> Counter[str | None]:
        """Take `num_items` items; return what each tenant was charged."""
        charged: Counter[str | None] = Counter()
        for _ in range(num_items):
            item = self.queue.peek()
            assert item is not None
            cost = costs.get(str(item.tenant), 1.0)
            assert self.pop(cost) is item
            charged[item.tenant] += cost
        return charged


def test_one_tenants_items_come_by_rank_then_number() -> None:
    shop = Shop()
    items = [shop.push(None, rank) for rank in (3.0, 1.0, 2.0, 1.0)]
    assert [shop.pop() for _ in items] == [items[1], items[3], items[2], items[0]]
    assert shop.queue.peek() is None


def test_tenants_that_wait_are_served_by_weight_whatever_an_item_costs() -> None:
    shop = Shop(heavy=3.0)
    for _ in range(400):
        shop.push("heavy")
        shop.push("light")
    charged = shop.serve(200, heavy=5.0, light=2.0)
    assert charged["heavy"] / 3.0 == pytest.approx(charged["light"], abs=5.0 / 3.0 + 2.0)


def test_a_tenant_that_was_away_has_saved_nothing_up() -> None:
    shop = Shop()
    for _ in range(1000):
        shop.push("steady")
    shop.serve(500)
    for _ in range(100):
        shop.push("late")
    charged = shop.serve(100)
    assert abs(charged["late"] - charged["steady"]) <= 1


def test_a_tenant_that_comes_back_at_once_is_still_charged_for_what_it_had() -> None:
    shop = Shop()
    for _ in range(1000):
        shop.push("steady")
    shop.push("greedy")
    charged: Counter[str | None] = Counter()
    for _ in range(1000):
        item = shop.pop(cost=9.0 if (first := shop.queue.peek()) and first.tenant == "greedy" else 1.0)
        charged[item.tenant] += 9.0 if item.tenant == "greedy" else 1.0
        if item.tenant == "greedy":
            shop.push("greedy")
    assert charged["greedy"] == pytest.approx(charged["steady"], abs=10)


def test_tenants_without_number_are_not_remembered_without_bound() -> None:
    shop = Shop()
    shop.push("stays", math.inf)
    for index in range(20_000):
        shop.push(f"tenant {index}")
        shop.serve(1, **{f"tenant {index}": 1e6})
    assert shop.queue.num_tenants < 5000
    shop.serve(1)
    shop.queue.forget()
    assert shop.queue.num_tenants == 0


def test_items_that_left_do_not_pile_up() -> None:
    shop = Shop()
    shop.push("a", -1.0)
    for _ in range(1000):
        shop.leave(shop.push("a"))
        shop.leave(shop.push("b"))
    assert len(shop.queue.share("a").heap) <= 70
    assert len(shop.queue.share("b").heap) == 0
    assert [item.rank for item in shop.queue] == [-1.0]
    assert len(shop.queue) == 1


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from([None, "a", "b", "c"]), st.integers(0, 3)),
        st.tuples(st.just("pop"), st.just(None), st.integers(0, 9)),
        st.tuples(st.just("charge"), st.sampled_from([None, "a", "b", "c"]), st.integers(0, 9)),
        st.tuples(st.just("leave"), st.just(None), st.integers(0, 99)),
    ),
    max_size=80,
)


@given(OPERATIONS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_next_is_the_least_served_tenants_lowest_rank(operations: list[tuple[str, str | None, int]]) -> None:
    shop = Shop(a=2.0)
    items: list[Item] = []
    for operation, tenant, number in operations:
        waiting = [item for item in items if item.waiting]
        if operation == "push":
            items.append(shop.push(tenant, float(number)))
        elif operation == "charge":
            shop.queue.share(tenant).charge(number)
        elif operation == "leave" and waiting:
            shop.leave(waiting[number % len(waiting)])
        elif operation == "pop" and waiting:
            least = min(shop.queue.share(item.tenant).service for item in waiting)
            assert least >= shop.queue.floor
            taken = shop.pop(number)
            share = shop.queue.share(taken.tenant)
            assert share.service - number / share.weight == pytest.approx(least)
            peers = [item for item in waiting if item.tenant == taken.tenant]
            assert (taken.rank, taken.number) == min((item.rank, item.number) for item in peers)
        assert sorted(item.number for item in shop.queue) == [item.number for item in items if item.waiting]
        assert len(shop.queue) == sum(item.waiting for item in items)
