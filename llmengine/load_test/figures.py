"""Figures of a load, from its records.

All latencies count from the moment at which a request was due:

    TTFT   to its first token
    E2E    to the end of its answer
    TPOT   (last arrival - first arrival) / tokens after the first arrival, of one request
    ITL    between tokens: a gap of g before an arrival of k tokens is k intervals of g / k
    gap    between arrivals, whatever they hold: how long a reader sees nothing new
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmengine.load_test.records import RequestRecord
from llmengine.load_test.runner import ClientCost, LoadResult
from llmengine.load_test.statistics import percentile, summary, weighted_summary

LATENCIES = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms", "gap_ms")
"""Names of the distributions in `figures`."""

_SATURATED_SHARE = 0.85
_LATE_SHARE = 0.2
_LATE_MS = 10.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """Latencies in ms that a good request stays within; None: any will do."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def is_met(self, record: RequestRecord) -> bool:
        """Whether a request succeeded within all of them."""
        if record.error is not None:
            return False
        limits = ((self.ttft_ms, ttft_s(record)), (self.tpot_ms, tpot_s(record)), (self.e2e_ms, e2e_s(record)))
        return all(limit is None or found is None or found * 1e3 <= limit for limit, found in limits)


def figures(result: LoadResult, objectives: Objectives | None = None) -> dict[str, Any]:
    """What a report says of a load. Only successful requests count, apart from `errors`."""
    good = [record for record in result.records if record.error is None]
    num_output = sum(map(num_tokens, good))
    num_prompt = sum(record.num_prompt_tokens or 0 for record in good)
    found: dict[str, Any] = {
        "arrivals": str(result.arrivals),
        "num_requests": len(result.records),
        "num_successful": len(good),
        "errors": _errors(result.records),
        "wall_s": result.wall_s,
        "requests_per_s": len(good) / result.wall_s,
        "output_tokens_per_s": num_output / result.wall_s,
        "total_tokens_per_s": (num_output + num_prompt) / result.wall_s,
        "prompt_tokens": summary(record.num_prompt_tokens for record in good if record.num_prompt_tokens is not None),
        "output_tokens": summary(map(num_tokens, good)),
        "ttft_ms": summary((s for s in map(ttft_s, good) if s is not None), 1e3),
        "itl_ms": weighted_summary((pair for record in good for pair in intervals_s(record)), 1e3),
        "tpot_ms": summary((s for s in map(tpot_s, good) if s is not None), 1e3),
        "e2e_ms": summary(map(e2e_s, good), 1e3),
        "gap_ms": summary((b - a for record in good for a, b in itertools.pairwise(record.arrivals)), 1e3),
    }
    if objectives is not None:
        num_met = sum(map(objectives.is_met, result.records))
        share = num_met / len(result.records) if result.records else 0.0
        found["goodput"] = {"share": share, "requests_per_s": num_met / result.wall_s}
    found["client"] = _client_figures(result.client, result.wall_s, num_output, result.records)
    found["warnings"] = list(_warnings(found, good))
    return found


def num_tokens(record: RequestRecord) -> int:
    """Output tokens by the server's count; without one, pieces stand for tokens."""
    return sum(record.num_pieces) if record.num_output_tokens is None else record.num_output_tokens


def ttft_s(record: RequestRecord) -> float | None:
    """Seconds to the first token; None if the answer had none that showed."""
    return record.arrivals[0] - record.due if record.arrivals else None


def e2e_s(record: RequestRecord) -> float:
    """Seconds to the end of the answer."""
    return record.finished - record.due


def tpot_s(record: RequestRecord) -> float | None:
    """Seconds for each token after the first arrival; None if all came at once."""
    if len(record.arrivals) < 2:
        return None
    return (record.arrivals[-1] - record.arrivals[0]) / (tokens_a_piece(record) * sum(record.num_pieces[1:]))


def intervals_s(record: RequestRecord) -> Iterator[tuple[float, float]]:
    """(seconds between tokens, number of such intervals) for each arrival after the first."""
    per_piece = tokens_a_piece(record)
    for (earlier, later), pieces in zip(itertools.pairwise(record.arrivals), record.num_pieces[1:], strict=True):
        tokens = pieces * per_piece
        yield (later - earlier) / tokens, tokens


def tokens_a_piece(record: RequestRecord) -> float:
    """Mean number of tokens in a piece.

    A server says how many tokens an answer has, not how many a chunk has. It may be less than 1: the token that ends an
    answer has a chunk with some servers only.
    """
    return (num_tokens(record) / sum(record.num_pieces) if record.num_pieces else 0.0) or 1.0


def _errors(records: Sequence[RequestRecord]) -> dict[str, dict[str, Any]]:
    """For each kind of failure, the most frequent first: how many there were, and what one of them said."""
    kinds: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.error is not None:
            kinds.setdefault(record.error, {"count": 0, "example": record.detail})["count"] += 1
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["count"]))


def _client_figures(
    client: ClientCost, wall_s: float, num_output: int, records: Sequence[RequestRecord]
) -> dict[str, float]:
    return {
        "cpu_share": client.cpu_s / wall_s,
        "cpu_us_per_token": 1e6 * client.cpu_s / num_output if num_output else 0.0,
        "lag_p99_ms": 1e3 * percentile(client.lags_s, 99) if client.lags_s else 0.0,
        "sent_late_p99_ms": 1e3 * percentile([record.sent - record.due for record in records], 99),
    }


def _warnings(found: Mapping[str, Any], good: Sequence[RequestRecord]) -> Iterator[str]:
    """Why the figures may not be what they seem."""
    client = found["client"]
    if client["cpu_share"] > _SATURATED_SHARE:
        yield (
            f"this client was busy {client['cpu_share']:.0%} of the time: it, not the target, may be the limit; "
            "use fewer streams, or several clients"
        )
    limit_ms = max(_LATE_MS, _LATE_SHARE * found["ttft_ms"]["p50"])
    late = {"woke up": client["lag_p99_ms"], "sent requests": client["sent_late_p99_ms"]}
    for what, late_ms in late.items():
        if late_ms > limit_ms:
            yield f"this client {what} up to {late_ms:.0f} ms late (p99); latencies contain that"
    if any(record.num_output_tokens is None for record in good):
        yield "the endpoint reports no usage in its streams: each chunk counts as one token"
    if found["num_successful"] < found["num_requests"]:
        yield f"{found['num_requests'] - found['num_successful']} requests failed; only the others are in the figures"
