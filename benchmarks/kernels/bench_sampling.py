"""Times of sampling in a CUDA graph beside torch's own functions; results are checked.

python -m benchmarks.kernels.bench_sampling [--rows 1 16 64 256] [--vocabs 32000 49152 128256]

Logits have a normal distribution with standard deviation 4, so that top_p=.9 keeps about 400 of 128256 tokens. The
"flat" column, at temperature 4, keeps 60 % of them, which is the worst case. "edits" is a greedy choice after penalties
on 1000 tokens or more, a bias for 300 tokens and 200 bad words; "everything" adds top_k, top_p, min_p and a mask of
allowed tokens. Batches of logits rotate; those of few rows stay in the L2 cache, as in a step whose LM head has just
written them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.report import new_parser, print_cells, require_gpu
from llmengine.kernels.logit_edits import EditTables, edit_logits_reference
from llmengine.kernels.sampling import SlotParams, TokenMasks, sample, sample_greedy, sampling_workspace
from llmengine.kernels.sampling_reference import distribution_reference, sample_greedy_reference
from llmengine.kernels.step import NUM_SAMPLES
from llmengine.kernels.timing import time_graph

COLD_BYTES = 160 << 20
KINDS = {
    "temperature": (1.0, 0, 1.0, 0.0),
    "top_k=50 top_p=.9": (1.0, 50, 0.9, 0.0),
    "top_p=.9": (1.0, 0, 0.9, 0.0),
    "flat top_p=.9": (4.0, 0, 0.9, 0.0),
    "min_p=.05": (1.0, 0, 1.0, 0.05),
}
"""temperature, top_k, top_p, min_p"""
EVERYTHING = (0.8, 50, 0.9, 0.02)
NUM_ENTRIES, MAX_ENTRIES, NUM_WORDS = 1300, 4096, 200


class Rows:
    """One batch of logits and the tensors that sampling it needs."""

    def __init__(self, num_rows: int, vocab: int) -> None:
        self.logits = torch.randn(num_rows, vocab, device="cuda") * 4.0
        self.counts = torch.zeros(8, dtype=torch.int32, device="cuda")
        self.counts[NUM_SAMPLES] = num_rows
        self.slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
        self.ids = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
        self.failed = torch.zeros_like(self.ids)
        self.workspace = sampling_workspace(num_rows, vocab, "cuda")

    def greedy(self) -> None:
        sample_greedy(self.logits, self.counts, self.ids, self.failed, self.workspace)

    def draw(self, params: SlotParams, edits: EditTables | None = None, masks: TokenMasks | None = None) -> None:
        sample(
            self.logits,
            self.counts,
            self.slots,
            self.slots,
            params,
            self.ids,
            self.failed,
            self.workspace,
            edits,
            masks,
        )

    def torch_draw(self) -> None:
        torch.multinomial(self.logits.softmax(-1), 1)

    def torch_sort(self) -> None:
        values, ids = self.logits.sort(dim=-1, descending=True)
        weights = values.softmax(-1)
        weights = weights.where(weights.cumsum(-1) - weights < 0.9, 0.0)
        ids.gather(1, torch.multinomial(weights, 1))


def slot_params(num_rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> SlotParams:
    """The same parameters for every slot, each with its own seed."""
    return SlotParams(
        temperature=torch.full((num_rows,), temperature, device="cuda"),
        top_k=torch.full((num_rows,), top_k, dtype=torch.int32, device="cuda"),
        top_p=torch.full((num_rows,), top_p, device="cuda"),
        min_p=torch.full((num_rows,), min_p, device="cuda"),
        seed=torch.arange(num_rows, device="cuda"),
    )


def edit_tables(num_rows: int, vocab: int) -> EditTables:
    """Tables in which every slot has entries, one in four with a bias only, and words of two tokens."""
    tables = EditTables.empty(num_rows, MAX_ENTRIES, NUM_WORDS, 2 * NUM_WORDS, 2, "cuda")
    for line in tables.entry_ids:
        line[:NUM_ENTRIES] = torch.randperm(vocab, device="cuda")[:NUM_ENTRIES]
    tables.num_entries.fill_(NUM_ENTRIES)
    tables.entry_states[:, :NUM_ENTRIES] = torch.arange(NUM_ENTRIES, device="cuda") % 4
    tables.entry_biases[:, :NUM_ENTRIES:4] = 0.5
    tables.penalties.copy_(torch.tensor([[1.1], [0.2], [0.2]]))
    tables.counting.fill_(1)
    tables.num_words.fill_(NUM_WORDS)
    tables.word_tokens.random_(0, vocab)
    tables.word_ends[:] = torch.arange(2, 2 * NUM_WORDS + 1, 2)
    tables.word_lengths.fill_(2)
    tables.word_untils.fill_(1 << 30)
    tables.ring[:] = tables.word_tokens[:, :1]
    tables.ring_masks.fill_(1)
    return tables


def check_greedy(rows: Rows) -> bool:
    """Whether the ids are right."""
    rows.greedy()
    return torch.equal(rows.ids.long(), sample_greedy_reference(rows.logits)[0])


def check_draw(rows: Rows, kind: tuple[float, int, float, float]) -> bool:
    """Whether the ids of the first rows are tokens that are kept, give or take the last one, and no row failed."""
    rows.draw(slot_params(len(rows.ids), *kind))
    kept = [distribution_reference(line, *kind) > 0 for line in rows.logits[:4]]
    lowest = torch.stack([line[mask].min() for line, mask in zip(rows.logits, kept, strict=False)])
    found = rows.logits[: len(kept)].gather(1, rows.ids[: len(kept), None].long())[:, 0]
    return bool((found >= lowest - 1e-3).all()) and not bool(rows.failed.any())


def check_edits(rows: Rows, kind: tuple[float, int, float, float], edits: EditTables, masks: TokenMasks | None) -> bool:
    """Whether the ids of the first rows are kept tokens of the edited logits, and the logits are unchanged after."""
    before = rows.logits.clone()
    lines = [edit_logits_reference(line, slot, slot, edits) for slot, line in enumerate(before[:4])]
    rows.draw(slot_params(len(rows.ids), *kind), edits, masks)
    right = torch.equal(rows.logits, before) and not bool(rows.failed.any())
    for row, line in enumerate(lines):
        if masks is not None:
            ids = torch.arange(len(line), device="cuda")
            line[((masks.words[row, ids // 32] >> (ids % 32)) & 1) == 0] = -torch.inf
        kept = distribution_reference(line, *kind) > 0
        right = right and bool(line[rows.ids[row].long()] >= line[kept].min() - 1e-3)
    return right


def timed(call: Callable[[Rows], None], batches: list[Rows], right: Callable[[Rows], bool] | None = None) -> str:
    """Microseconds, marked if the result is wrong, or the name of the exception."""

    def bound(rows: Rows) -> Callable[[], None]:
        return lambda: call(rows)

    try:
        mark = "" if right is None or right(batches[0]) else " WRONG"
        return f"{time_graph([bound(rows) for rows in batches]):.1f}{mark}"
    except Exception as error:  # one failure must not end the benchmark
        torch.cuda.synchronize()
        return type(error).__name__


def measure_edits(batches: list[Rows], kind: tuple[float, int, float, float], masked: bool) -> str:
    """Microseconds of sampling after edits."""
    num_rows, vocab = batches[0].logits.shape
    params, tables = slot_params(num_rows, *kind), edit_tables(num_rows, vocab)
    masks = None
    if masked:
        words = torch.randint(-(2**31), 2**31, (num_rows, -(-vocab // 32)), dtype=torch.int32, device="cuda")
        masks = TokenMasks(torch.arange(num_rows, dtype=torch.int32, device="cuda"), words)
    return timed(
        lambda rows: rows.draw(params, tables, masks), batches, lambda rows: check_edits(rows, kind, tables, masks)
    )


def measure(num_rows: int, vocab: int) -> list[str]:
    """One line of the table."""
    size_bytes = 4 * num_rows * vocab
    batches = [Rows(num_rows, vocab) for _ in range(min(64, max(2, -(-COLD_BYTES // size_bytes))))]
    cells = [timed(Rows.greedy, batches, check_greedy)]
    for kind in KINDS.values():
        params = slot_params(num_rows, *kind)

        def draw(rows: Rows, params: SlotParams = params) -> None:
            rows.draw(params)

        def right(rows: Rows, kind: tuple[float, int, float, float] = kind) -> bool:
            return check_draw(rows, kind)

        cells.append(timed(draw, batches, right))

    cells += [measure_edits(batches, (0.0, 0, 1.0, 0.0), masked=False), measure_edits(batches, EVERYTHING, masked=True)]

    def argmax(rows: Rows) -> None:
        rows.logits.argmax(-1)

    few: list[Rows] = batches[:4]
    cells += [timed(argmax, batches), timed(Rows.torch_draw, few), timed(Rows.torch_sort, few)]
    return [str(num_rows), str(vocab), f"{size_bytes / 3.0e6:.1f}", *cells]


def main() -> None:
    """Print the table."""
    parser = new_parser("kernels.bench_sampling", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--vocabs", type=int, nargs="+", default=[32000, 49152, 128256])
    arguments = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    torch_columns = ["argmax", "multinomial", "sort top_p"]
    print(f"{torch.cuda.get_device_name()}; microseconds")
    print_cells(["rows", "vocab", "at 3 TB/s", "greedy", *KINDS, "edits", "everything", *torch_columns], 17)
    for vocab in arguments.vocabs:
        for num_rows in arguments.rows:
            print_cells(measure(num_rows, vocab), 17)


if __name__ == "__main__":
    main()
