"""Segments of shards: what all ranks compute, with the sums between their plans, is what the model computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends.cuda.fused_segments import SegmentsContext
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.backends.tensorrt.model_segments import shard_segments_of
from llmengine.backends.tensorrt.runtime import PlanRuntime
from llmengine.backends.tensorrt.segments import TensorRtSegments, load_plans
from llmengine.backends.tensorrt.spec import (
    WeightMode,
    make_profiles,
    segments_by_plan,
    spec_from_dict,
)
from llmengine.backends.tensorrt.verify import joined, verify_plans
from llmengine.checkpoints.sharded_source import ShardPlan
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.sharding import Shard, cuts, held_by
from llmengine.quantization.model_formats import DENSE_MODEL
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.rank_fakes import on_threads, thread_peers
from tests.backends.tensorrt.segment_helpers import FAMILIES, PROFILES, ReferenceSegments, random_weights, tiny_arch

MAX_ROWS, MAX_TOKENS = 4, 16
CPU = torch.device("cpu")

SIZES = {"even": {}, "uneven": {"num_heads": 6, "num_kv_heads": 3}}
"""Two ranks have 2 and 2 heads of queries, or 4 and 2."""


def divided_arch(sizes: str, **changes: Any) -> ModelArch:
    return tiny_arch(**{**SIZES[sizes], "vocab_size": 73 if sizes == "uneven" else 72, **changes})


def rank_segments(plan: ShardPlan, mode: WeightMode, rank: int, weights: dict[str, Tensor], peers: Any) -> Any:
    """Return the segments of one rank, on fake plans, and its fake library."""
    dtype = next(iter(weights.values())).dtype
    arch, own = plan.arch_of(rank), {name: plan.shard(name, tensor, rank) for name, tensor in weights.items()}
    config = ModelConfig(
        Path("unused"),
        scheduler_config=SchedulerConfig(max_batch_size=MAX_ROWS, max_tokens_per_step=MAX_TOKENS),
    )
    context = SegmentsContext(
        arch, CudaWeights.of(arch, own, dtype), config, torch.zeros(MAX_ROWS, arch.vocab_size), pdl=False, peers=peers
    )
    placed = shard_segments_of(plan, "float32", make_profiles(MAX_ROWS, MAX_TOKENS), mode)
    mine = [segment for segment in placed if segment.rank == rank]
    fake = FakeTensorRt(CPU)
    plan_set = fake_plan_set(mine, own)
    return TensorRtSegments.allocate(mine, load_plans(PlanRuntime.start(fake_library(fake)), plan_set), context), fake


def run_steps(segments: TensorRtSegments, x: Tensor, attended: list[Tensor], rows: list[int] | None) -> list[Tensor]:
    """Return qkv and hidden states of each layer, and the logits, for given results of the attentions."""
    results = [segments.first(x).clone()]
    for layer, values in enumerate(attended[:-1]):
        x, qkv = segments.mid(layer, values, x)
        results += [x.clone(), qkv.clone()]
    sampled = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    before = x.clone()
    logits = [segments.last(attended[-1], x, sampled).clone() for _ in range(2)]
    if rows is not None:  # the log-probabilities of prompts take the same hidden states several times
        assert torch.equal(x, before)
        assert torch.equal(*logits)
    return [*results, logits[0]]


@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_ranks_compute_the_model_together(family: str, sizes: str) -> None:
    arch = divided_arch(sizes, **FAMILIES[family])
    plan, weights = ShardPlan(arch, DENSE_MODEL, 2), random_weights(arch, torch.float32)
    peers, whole = thread_peers(2), ReferenceSegments(arch, weights)
    ranks = [rank_segments(plan, "inputs", rank, weights, peers[rank]) for rank in range(2)]
    held = [cuts(arch, held_by(arch, Shard(rank, 2))) for rank in range(2)]
    columns = [torch.cat([torch.tensor(part) for part in cut["layers.0.o.weight"].ranges]) for cut in held]
    rows_of_qkv = [torch.cat([torch.tensor(part) for part in cut["layers.0.qkv.weight"].ranges]) for cut in held]
    for num_tokens, rows in ((3, None), (16, [15, 2]), (9, [5, 5, 8, 0])):
        x = torch.randn(num_tokens, arch.hidden_size)
        attended = [torch.randn(num_tokens, arch.num_heads * arch.head_dim) for _ in range(3)]

        def run(rank: int) -> list[Tensor]:
            own = [values[:, columns[rank]].contiguous() for values in attended]  # noqa: B023
            return run_steps(ranks[rank][0], x.clone(), own, rows)  # noqa: B023

        found = on_threads(2, run)
        qkv = whole.first(x)
        wanted, hidden = [qkv], x
        for layer in range(2):
            hidden, qkv = whole.mid(layer, attended[layer], hidden)
            wanted += [hidden, qkv]
        logits = whole.last(attended[2], hidden, torch.arange(num_tokens) if rows is None else torch.tensor(rows))
        for rank in range(2):
            for value, exact in zip(found[rank][:-1], wanted, strict=True):
                part = exact if exact.shape[1] == arch.hidden_size else exact[:, rows_of_qkv[rank]]
                torch.testing.assert_close(value.double(), part, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.cat([one[-1] for one in found], 1).double(), logits, rtol=1e-4, atol=1e-4)


def test_all_ranks_sum_twice_in_each_layer_and_alone_not_at_all() -> None:
    arch = divided_arch("uneven")
    plan, weights, peers = ShardPlan(arch, DENSE_MODEL, 2), random_weights(arch, torch.float32), thread_peers(2)
    ranks = [rank_segments(plan, "inputs", rank, weights, peers[rank]) for rank in range(2)]

    def run(rank: int) -> None:
        own = plan.arch_of(rank)
        values = [torch.randn(2, own.num_heads * own.head_dim) for _ in range(3)]
        run_steps(ranks[rank][0], torch.randn(2, own.hidden_size), values, None)

    on_threads(2, run)
    sums: Any = [one.collectives for one in peers]
    assert [one.num_sums for one in sums] == [2 * (2 + 2)] * 2  # of the last layer twice, as `run_steps` does
    for _, fake in ranks:
        layer = ["o", "mlp", "next"]
        assert fake.executed == ["first", *layer, *layer, "o", "mlp", "head", "o", "mlp", "head"]
        assert fake.num_contexts == len(["first", *layer, "head"]), "the last layer's are those of all layers"
    alone = ranks[0][0].without_sums()
    run_steps(alone, torch.randn(2, arch.hidden_size), [torch.randn(2, 64)] * 3, [1])
    assert [one.num_sums for one in sums] == [8, 8]


def test_plans_that_hold_their_weights_are_each_ranks_own() -> None:
    arch = divided_arch("even")
    plan, weights, peers = ShardPlan(arch, DENSE_MODEL, 2), random_weights(arch, torch.float32), thread_peers(2)
    results = []
    x, attended = torch.randn(3, arch.hidden_size), [torch.randn(3, 32) for _ in range(3)]
    modes: tuple[WeightMode, ...] = ("inputs", "constants")
    for mode in modes:
        ranks = [rank_segments(plan, mode, rank, weights, peers[rank])[0] for rank in range(2)]
        results.append(on_threads(2, lambda rank: run_steps(ranks[rank], x, attended, None)))  # noqa: B023
    for inputs, constants in zip(*results, strict=True):
        for value, other in zip(inputs, constants, strict=True):
            torch.testing.assert_close(value, other)
    names = list(segments_by_plan(shard_segments_of(plan, "float16", PROFILES, "constants")))
    own = ["first", "o.0", "mlp.0", "next.0", "o.1", "mlp.1", "next.1", "o.2", "mlp.2", "head"]
    assert names == [*own, *(f"{name}.rank1" for name in own)]


def test_ranks_of_the_same_shapes_share_plans() -> None:
    even = shard_segments_of(ShardPlan(divided_arch("even"), DENSE_MODEL, 2), "float16", PROFILES)
    assert list(segments_by_plan(even)) == ["first", "o", "mlp", "next", "head"]
    uneven = shard_segments_of(ShardPlan(divided_arch("uneven"), DENSE_MODEL, 2), "float16", PROFILES)
    assert [segment.plan_name for segment in uneven if segment.rank] == [
        *("first.rank1", "o.rank1", "mlp", "next.rank1", "o.rank1", "mlp", "next.rank1", "o.rank1", "mlp"),
        "head.rank1",
    ]
    for segment in uneven:
        assert spec_from_dict(json.loads(json.dumps(segment.spec.to_dict()))) == segment.spec


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_weight_of_a_shard_but_those_of_our_kernels_is_in_a_segment(family: str) -> None:
    arch = divided_arch("uneven", **FAMILIES[family])
    plan = ShardPlan(arch, DENSE_MODEL, 2)
    for rank in range(2):
        shapes = canonical_shapes(plan.arch_of(rank))
        ours = set() if arch.tie_word_embeddings else {"embed_tokens.weight"}
        placed = [one for one in shard_segments_of(plan, "float32", PROFILES) if one.rank == rank]
        used = [
            (name, weight.shape)
            for one in placed
            for weight in one.spec.weights
            for name in [weight.canonical(one.layer)]
        ]
        assert len(used) == len(set(used))
        assert {name: tuple(shape) for name, shape in shapes.items() if name not in ours} == dict(used)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sound_plans_of_shards_pass_verification(dtype: Any) -> None:
    arch = tiny_arch(**{**FAMILIES["gemma2"], "num_heads": 6, "num_kv_heads": 3})
    placed = shard_segments_of(ShardPlan(arch, DENSE_MODEL, 2), dtype, PROFILES)
    runtime, plan_set = PlanRuntime.start(fake_library(FakeTensorRt(CPU))), fake_plan_set(placed)
    found = [
        verify_plans(own.segments, load_plans(runtime, own), CPU) for own in (plan_set.of_rank(0), plan_set.of_rank(1))
    ]
    whole = joined(found)
    assert not whole.failures
    assert {check.plan for check in whole.checks} == set(segments_by_plan(placed))
    bad = dataclasses.replace(found[1].checks[0], rms_error=99.0)
    worse = dataclasses.replace(found[1], checks=(bad, *found[1].checks[1:]))
    assert joined([found[0], worse]).failures == [bad]
