"""`benchmarks.cluster_wire` on small loads."""

from __future__ import annotations

from benchmarks.cluster_wire import compare, scale


async def test_tables() -> None:
    rows = await compare(["local"], concurrency=2, num_requests=4, step_s=0.0)
    assert [row[0] for row in rows] == ["`LLM`", "in this process"]
    assert all(len(row) == 7 for row in rows)
    rows = await scale(["local"], batch_size=2, num_requests=2, step_s=0.001)
    assert [row[1] for row in rows] == ["1", "2", "4"]
