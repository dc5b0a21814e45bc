"""`ModelSource`: a checkpoint as an architecture and a stream of canonical weights, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import ModelArch, canonical_shapes, fused_parts, head_order

if TYPE_CHECKING:
    import torch

    from llmengine.checkpoints.gguf_checkpoint import GgufFile
    from llmengine.checkpoints.saved_plans import SavedPlans

SourceKind = Literal["huggingface", "gguf", "engine", "dummy"]
WeightStream = Iterator[tuple[str, "torch.Tensor"]]

COPY_ELEMENTS = 1 << 22
"""Elements converted at a time, so that a temporary copy of a large embedding stays small."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A checkpoint whose metadata is read and checked, and whose weights are not read yet.

    Attributes:
        path: the directory or file that was opened.
        checkpoint_dtype: "float32", "float16" or "bfloat16", as the files say; float16 for a quantized GGUF.
        generation_config: contents of generation_config.json, empty if there is none.
        eos_token_ids: ids that end a generation, in the order of the files; may be empty.
        bos_token_id: id that begins a text, None if the files name none.
        tokenizer_path: directory with the tokenizer's files, or the GGUF file.
        stream: makes the unchecked weight stream; use `weights`.
        quantization: how an engine directory's weights are quantized; empty: not at all.
        gguf: the parsed GGUF file, for its tokenizer.
        plans: what an engine directory keeps beside the weights.
    """

    kind: SourceKind
    path: Path
    arch: ModelArch
    checkpoint_dtype: str
    generation_config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tokenizer_path: Path
    stream: Callable[[torch.dtype], WeightStream]
    quantization: dict[str, Any] = field(default_factory=dict)
    gguf: GgufFile | None = None
    plans: SavedPlans | None = None

    def weights(self, dtype: torch.dtype) -> WeightStream:
        """Yield every canonical weight once, on the CPU, in `dtype`, in the order of `arch.canonical_shapes`.

        Matrices of an engine saved as int8 come as int8, each followed by its `weight_scale` (see `weight_layout`).
        Tensors are freshly allocated and contiguous; the caller owns them. Beyond those the caller keeps, memory
        peaks at one fused tensor plus a bounded conversion buffer (a checkpoint in .bin files is also memory-mapped).
        Raises `CorruptFileError` naming file and tensor for missing, left-over, misshapen or truncated tensors.
        """
        expected = iter(weight_layout(self.arch, _dtype_name(dtype), self.quantization).items())
        for name, tensor in self.stream(dtype):
            streamed, wanted = (name, (_dtype_name(tensor.dtype), tuple(tensor.shape))), next(expected, None)
            assert streamed == wanted, f"{streamed} streamed, expected {wanted}"
            assert tensor.is_contiguous()
            yield name, tensor
        assert next(expected, None) is None


def weight_layout(
    arch: ModelArch, dtype: str, quantization: Mapping[str, Any]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every streamed tensor, in order, for `canonical_shapes` in `dtype`.

    Norms are float32 where `arch.float32_norms`. With quantization["weights"] == "int8" the layers' matrices and
    lm_head are int8, each followed by a `weight_scale`, float32 [rows]. Raises `UnsupportedModelError` for a
    quantization other than "none" and "int8".
    """
    weights = quantization.get("weights", "none")
    if weights not in ("none", "int8"):
        raise UnsupportedModelError(f"quantization of weights {weights!r} is not supported; supported are: none, int8")
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in canonical_shapes(arch).items():
        is_int8 = weights == "int8" and len(shape) == 2 and name != "embed_tokens.weight"
        is_float32 = arch.float32_norms and name.endswith("norm.weight")
        layout[name] = ("int8" if is_int8 else "float32" if is_float32 else dtype, shape)
        if is_int8:
            layout[f"{name}_scale"] = ("float32", shape[:1])
    return layout


def stream_fused(arch: ModelArch, dtype: torch.dtype, read_part: Callable[[str, torch.Tensor], None]) -> WeightStream:
    """Yield the canonical weights of `arch`; `read_part(name, out)` fills each part's rows, in `fused_parts` order.

    Heads of q and k are brought from the checkpoint's order of rows into `head_order`.
    """
    import torch

    layout, order = weight_layout(arch, _dtype_name(dtype), {}), head_order(arch)
    for name, parts in fused_parts(arch).items():
        stored_dtype, whole = layout[name]
        fused = torch.empty(whole, dtype=getattr(torch, stored_dtype))
        row = 0
        for part, shape in parts:
            rows = fused[row : row + shape[0]]
            read_part(part, rows)
            if order is not None and part.split(".")[-2] in ("q", "k", "q_norm", "k_norm"):
                for head in rows.split(arch.head_dim):
                    head.copy_(head[list(order)])
            row += shape[0]
        yield name, fused


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Where a checkpoint has a part: rows [first_row, first_row + num_rows) of a tensor with `total_rows`."""

    tensor: str
    first_row: int
    num_rows: int
    total_rows: int


def stored_parts(arch: ModelArch, stored_name: Callable[[str], str]) -> dict[str, StoredPart]:
    """Return where every part of `arch` is stored; parts with one stored name are stacked there in order."""
    first_rows: dict[str, int] = {}
    totals = {name: shape[0] for name, shape in stored_shapes(arch, stored_name).items()}
    places = {}
    for parts in fused_parts(arch).values():
        for part, shape in parts:
            name = stored_name(part)
            first = first_rows.get(name, 0)
            places[part] = StoredPart(name, first, shape[0], totals[name])
            first_rows[name] = first + shape[0]
    return places


def stored_shapes(arch: ModelArch, stored_name: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Return name in the files -> shape, for every part of `arch`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parts in fused_parts(arch).values():
        for part, shape in parts:
            name = stored_name(part)
            shapes[name] = (shapes.get(name, (0,))[0] + shape[0], *shape[1:])
    return shapes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    is_harmless: Callable[[str], bool] = lambda name: False,
    file_of: Callable[[str], str] | None = None,
    may_be_padded: Collection[str] = (),
) -> None:
    """Raise `CorruptFileError` unless the files hold the `expected` names and shapes, and beyond only harmless ones.

    Those that `may_be_padded` may have more rows than expected: an embedding's beyond the vocabulary are no token's.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise CorruptFileError(f"{where}: {_count(missing)} missing: {_listed(missing)}")
    for name, shape in expected.items():
        is_padded = name in may_be_padded and found[name][1:] == shape[1:] and found[name][:1] > shape[:1]
        if found[name] != shape and not is_padded:
            file = file_of(name) if file_of else where
            raise CorruptFileError(f"{file}: tensor {name!r} has shape {found[name]}, expected {shape}")
    left_over = [name for name in found if name not in expected and not is_harmless(name)]
    if left_over:
        raise CorruptFileError(
            f"{where}: {_count(left_over)} left over that the model as configured has not: {_listed(left_over)}"
        )


def read_exactly(file: BinaryIO, out: torch.Tensor, what: str) -> None:
    """Fill `out` (contiguous) with the next bytes of `file`; raises `CorruptFileError` naming `what` if they end."""
    import torch

    buffer: memoryview = out.view(-1).view(torch.uint8).numpy().data
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CorruptFileError(f"{what}: {len(buffer) - filled} of {len(buffer)} bytes are missing: truncated?")
        filled += count


def unique_ids(ids: Iterable[int]) -> tuple[int, ...]:
    """Return the ids without repetitions, in first-seen order."""
    return tuple(dict.fromkeys(ids))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
