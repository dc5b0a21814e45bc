"""Milliseconds per step of the CPU sampler.

python -m benchmarks.sampling [--rows 1 16 64 256] [--vocab 128256]

Logits have a normal distribution with standard deviation 4; every slot has a prompt of 1000 tokens. "everything" means
penalties, a bias for 300 tokens, 200 bad words of two tokens, log-probabilities of 2 alternatives, top_k, top_p, min_p
and a mask of allowed tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.report import median, new_parser, print_cells
from llmengine.backends.cpu.sampler import Sampler
from llmengine.batch import SlotInit
from llmengine.sampling_params import SamplingParams

REPEATS = 7
DRAWN = SamplingParams(temperature=0.8)
PENALIZED = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.2)


def kinds(vocab: int) -> dict[str, SamplingParams]:
    """What is measured, by name; in small vocabularies "everything" has fewer biases and bad words."""
    step = max(1, min(10, vocab // 300))
    return {
        "greedy": SamplingParams(),
        "temperature": DRAWN,
        "min_p": DRAWN.replace(min_p=0.05),
        "top_k top_p": DRAWN.replace(top_k=50, top_p=0.9),
        "top_p": DRAWN.replace(top_p=0.9),
        "penalties": PENALIZED,
        "everything": PENALIZED.replace(
            temperature=0.8,
            top_k=50,
            top_p=0.9,
            min_p=0.02,
            logprobs=2,
            logit_bias=dict.fromkeys(range(0, min(vocab, 300 * step), step), 0.5),
            bad_words=[(token_id, token_id + 1) for token_id in range(min(200, vocab - 1))],
        ),
    }


def measure(params: SamplingParams, num_rows: int, vocab: int, masks: dict[int, NDArray[np.int32]]) -> float:
    """Median milliseconds of a step."""
    random = np.random.default_rng(0)
    sampler = Sampler(num_rows, vocab)
    for slot in range(num_rows):
        sampler.init_slot(SlotInit(slot, random.integers(0, vocab, 1000).tolist(), 1000, params, slot, frozenset()))
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(0)) * 4.0
    times = []
    for position in range(1000, 1000 + REPEATS):
        began = time.perf_counter()
        sampler.sample(logits, np.arange(num_rows), np.full(num_rows, position), masks)
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = new_parser("sampling", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--vocab", type=int, default=128256)
    arguments = parser.parse_args(argv)
    if arguments.vocab < 2:
        parser.error(f"--vocab must be at least 2, not {arguments.vocab}")
    measured = kinds(arguments.vocab)
    print(f"CPU, {torch.get_num_threads()} threads, vocabulary of {arguments.vocab}; milliseconds")
    print_cells(["rows", *measured], 12)
    for num_rows in arguments.rows:
        masks = dict.fromkeys(range(num_rows), np.full(-(-arguments.vocab // 32), -2, dtype=np.int32))
        cells = [
            f"{measure(params, num_rows, arguments.vocab, masks if name == 'everything' else {}):.2f}"
            for name, params in measured.items()
        ]
        print_cells([num_rows, *cells], 12)


if __name__ == "__main__":
    main()
