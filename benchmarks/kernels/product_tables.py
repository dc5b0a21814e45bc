"""Markdown tables of what `bench_packed` measured: each product of a format, and a layer in all formats, by rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.report import format_table

BASELINE = "bf16"
LAYER = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Result:
    """A product in a format with one configuration.

    Attributes:
        rows: of x.
        weight_bytes: as the device holds the matrix, scales included.
        flops: two for each multiplication and addition.
        error: largest one, relative to the largest result; None for NaN.
        is_right: whether the error is no more than rounding makes it.
    """

    model: str
    weight_format: str
    product: str
    rows: int
    config: str
    us: float
    weight_bytes: int
    flops: float
    error: float | None
    is_right: bool

    @property
    def speed(self) -> Speed:
        """The product's time, and what it reads and multiplies in it."""
        return Speed(self.us, self.weight_bytes, self.flops)


@dataclass(frozen=True, slots=True)
class Speed:
    """Microseconds of one product or of several after each other, and what they read and multiply."""

    us: float
    weight_bytes: float
    flops: float

    @property
    def cells(self) -> tuple[str, str, str]:
        """Microseconds, TB/s of weights and TFLOP/s."""
        return f"{self.us:,.1f}", f"{self.weight_bytes / self.us / 1e6:.2f}", f"{self.flops / self.us / 1e6:,.1f}"


Fastest = dict[tuple[str, str, int], Result]
"""(format, product, rows) -> the result that took least time."""


def fastest(results: Iterable[Result]) -> Fastest:
    """The fastest right result of each product, in the order of `results`."""
    found: Fastest = {}
    for result in results:
        key = result.weight_format, result.product, result.rows
        if result.is_right and (key not in found or result.us < found[key].us):
            found[key] = result
    return found


def layer_speed(best: Fastest, weight_format: str, rows: int) -> Speed | None:
    """A layer's four products one after the other; None if one is missing."""
    found = [best.get((weight_format, product, rows)) for product in LAYER]
    speeds = [one.speed for one in found if one is not None]
    if len(speeds) < len(LAYER):
        return None
    return Speed(
        sum(one.us for one in speeds), sum(one.weight_bytes for one in speeds), sum(one.flops for one in speeds)
    )


def product_table(best: Fastest, weight_format: str) -> str:
    """A row for each product and number of rows in a format, then for the layer; bf16's time beside it."""
    products = list(dict.fromkeys(product for name, product, _ in best if name == weight_format))
    counts = sorted({rows for name, _, rows in best if name == weight_format})
    lines: list[list[str]] = []
    for product in products:
        for rows in counts:
            one, dense = best.get((weight_format, product, rows)), best.get((BASELINE, product, rows))
            if one is not None:
                error, beside = f"{one.error:.1e}", None if dense is None else dense.speed
                lines.append(_line(product, rows, one.config, error, one.speed, beside))
    for rows in counts:
        layer = layer_speed(best, weight_format, rows)
        if layer is not None:
            lines.append(_line("layer", rows, "", "", layer, layer_speed(best, BASELINE, rows)))
    header = [weight_format, "M", "configuration", "error", "us", "TB/s", "TFLOP/s", f"{BASELINE} us", "speed-up"]
    num_columns = len(header) - 2 if weight_format == BASELINE else len(header)
    return format_table(header[:num_columns], [line[:num_columns] for line in lines])


def _line(product: str, rows: int, config: str, error: str, speed: Speed, dense: Speed | None) -> list[str]:
    beside = ["", ""] if dense is None else [dense.cells[0], f"{dense.us / speed.us:.2f}"]
    return [product, str(rows), config, error, *speed.cells, *beside]


def layer_table(best: Fastest, model: str) -> str:
    """A row for each format: a layer's microseconds, TB/s and TFLOP/s by rows."""
    formats = dict.fromkeys(name for name, _, _ in best)
    counts = sorted({rows for _, _, rows in best})
    lines = []
    for name in formats:
        speeds = [layer_speed(best, name, rows) for rows in counts]
        lines.append([name, *("" if speed is None else " / ".join(speed.cells) for speed in speeds)])
    return format_table([f"{model} layer: us / TB/s / TFLOP/s", *(f"M={rows}" for rows in counts)], lines)


def tables(results: Sequence[Result]) -> str:
    """All tables of each model among the results; at the end the configurations whose results were wrong."""
    parts = []
    for model in dict.fromkeys(result.model for result in results):
        best = fastest(result for result in results if result.model == model)
        formats = dict.fromkeys(name for name, _, _ in best)
        parts += [product_table(best, name) for name in formats]
        parts.append(layer_table(best, model))
    wrong = [
        f"{one.model} {one.weight_format} {one.product} M={one.rows} {one.config}" for one in wrong_results(results)
    ]
    if wrong:
        parts.append(f"WRONG: {', '.join(wrong)}")
    return "\n\n".join(parts)


def wrong_results(results: Iterable[Result]) -> list[Result]:
    """Those that differ from the reference by more than rounding does."""
    return [result for result in results if not result.is_right]
