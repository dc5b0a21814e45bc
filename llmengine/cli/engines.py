"""The commands for saved engines: `build`, `inspect` and `verify`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmengine.checkpoints.engine_dir import require_replaceable
from llmengine.checkpoints.saved_files import size_text
from llmengine.cli.announcement import announce
from llmengine.cli.arguments import add_quant_argument, positive_int
from llmengine.cli.quality import add_evaluation_arguments, check_evaluation_arguments, report_lines
from llmengine.config import BY_DEVICE, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.quantization.quality_report import QualityReport

if TYPE_CHECKING:
    from rich.table import Table

_WEIGHTS_HELP = (
    "how plans hold weights: 'inputs' leaves them out, so that one plan serves all layers (default); 'constants' "
    "builds them in; 'fastest' times a layer both ways on this machine's GPU"
)


def add_engine_commands(commands: Any) -> None:
    """Add the commands to the subparsers of `llmengine`."""
    _add_build_command(commands)
    inspect = commands.add_parser("inspect", help="show what a saved engine holds")
    inspect.add_argument("directory", type=Path, metavar="DIR", help="a saved engine")
    inspect.add_argument("--json", action="store_true", help="print the manifest")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="check a saved engine's files, and its plans where they can run")
    verify.add_argument("directory", type=Path, metavar="DIR", help="a saved engine")
    verify.add_argument("--json", action="store_true", help="print the findings as JSON")
    verify.set_defaults(run=_verify)


def _add_build_command(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="build a model's TensorRT plans and save them with its weights; with --quant: quantize it, measure its "
        "quality and save it",
    )
    build.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory, .gguf file or saved engine")
    build.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="where to save the engine; replaces an engine saved there",
    )
    build.add_argument(
        "--sm",
        type=_compute_capabilities,
        default=(),
        metavar="LIST",
        help="compute capabilities to build for, such as 89,120 (default: this machine's first GPU)",
    )
    build.add_argument("--flavour", choices=("auto", "tensorrt", "tensorrt_rtx"), default="auto", help="default: auto")
    build.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="default: auto, the checkpoint's",
    )
    build.add_argument("--weights", choices=("inputs", "constants", "fastest"), help=_WEIGHTS_HELP)
    build.add_argument(
        "--max-batch-size", type=positive_int, default=BY_DEVICE, metavar="N", help="most requests in a step"
    )
    build.add_argument(
        "--max-tokens-per-step", type=positive_int, default=BY_DEVICE, metavar="N", help="most tokens in a step"
    )
    build.add_argument(
        "--tp",
        type=positive_int,
        default=1,
        metavar="N",
        help="make sure that N processes can share each matrix; with --backend tensorrt: build the plans of N GPUs; "
        "with --quant: quantize with N processes. The result loads with any other --tp too, for which plans are built "
        "anew",
    )
    build.add_argument(
        "--backend",
        choices=("torch", "tensorrt"),
        help="torch: save the weights without plans (default: torch with --tp above 1, else tensorrt)",
    )
    build.add_argument(
        "--dummy", action="store_true", help="use random weights; needs only the directory's config.json"
    )
    quantized = build.add_argument_group("quantization", "no plans are built; build from the result for these")
    add_quant_argument(quantized, "quantize the weights")
    quantized.add_argument(
        "--max-perplexity-increase",
        type=float,
        metavar="SHARE",
        help="fail, and save nothing, if the perplexity rises by more than this: 0.01 is 1 %%",
    )
    quantized.add_argument("--skip-evaluation", action="store_true", help="save without a quality report")
    add_evaluation_arguments(quantized)
    build.set_defaults(run=_build)


def _compute_capabilities(text: str) -> tuple[int, ...]:
    """Compute capabilities from an argument: (89, 120) for "89,120" and for "8.9,12.0"."""
    try:
        found = tuple(int(part.strip().replace(".", "")) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a list of compute capabilities such as 89,120, not {text!r}"
        ) from None
    if not all(50 <= value <= 999 for value in found):
        raise argparse.ArgumentTypeError(f"must be a list of compute capabilities such as 89,120, not {text!r}")
    return found


def _build(arguments: argparse.Namespace) -> int:
    if arguments.quant is not None:
        return _build_quantized(arguments)
    evaluating = {"max_perplexity_increase": None, "windows": 32, "window_tokens": 512, "stride": None}
    for name, default in {**evaluating, "skip_evaluation": False, "skip_speed": False}.items():
        if getattr(arguments, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} needs --quant: nothing is quantized without it")
    if (arguments.backend or ("torch" if arguments.tp > 1 else "tensorrt")) == "torch":
        return _build_without_plans(arguments)
    from llmengine import saved_engines

    built = saved_engines.build(
        arguments.model,
        arguments.output,
        lambda line: print(line, file=sys.stderr, flush=True),
        compute_capabilities=arguments.sm,
        flavour=arguments.flavour,
        dtype=arguments.dtype,
        weight_mode=arguments.weights,
        scheduler_config=SchedulerConfig(
            max_batch_size=arguments.max_batch_size, max_tokens_per_step=arguments.max_tokens_per_step
        ),
        load_format="dummy" if arguments.dummy else "auto",
        tp_size=arguments.tp,
    )
    facts = saved_engines.inspect(arguments.output)
    print(
        f"{arguments.output}: {size_text(facts['size_bytes'])}, including {size_text(built.plans.size_bytes)} in "
        f"{len(built.plans.plans)} plans; building took {built.plans_s:.1f} s, saving {built.save_s:.1f} s"
    )
    if built.layer_times is not None:
        print(f"{built.layer_times}; the plans hold weights as {built.layer_times.fastest}")
    ran = "no plan was run" if built.layer_times is None else "no other plan was run"
    print(f"built with {built.plans.producer}; {ran}; LLM verifies every plan on the GPU that loads it")
    return 0


def _build_without_plans(arguments: argparse.Namespace) -> int:
    """Save a model for any number of processes."""
    _refuse_plan_options(arguments, "--backend torch" if arguments.backend else "--tp without --backend tensorrt")
    from llmengine import saved_engines

    load_format: Literal["auto", "dummy"] = "dummy" if arguments.dummy else "auto"
    saved_engines.build_without_plans(arguments.model, arguments.output, arguments.tp, arguments.dtype, load_format)
    size = size_text(saved_engines.inspect(arguments.output)["size_bytes"])
    print(
        f"{arguments.output}: {size}, without plans; load it with --tp {arguments.tp}, or any other number that works"
    )
    return 0


def _refuse_plan_options(arguments: argparse.Namespace, because_of: str) -> None:
    unset = {"sm": (), "flavour": "auto", "weights": None}
    for name, default in {**unset, "max_batch_size": BY_DEVICE, "max_tokens_per_step": BY_DEVICE}.items():
        if getattr(arguments, name) != default:
            raise ConfigError(f"{because_of} excludes --{name.replace('_', '-')}, which is about TensorRT plans")


def _build_quantized(arguments: argparse.Namespace) -> int:
    """Quantize a model, compare it with itself as it was, and save it if it is good enough."""
    _refuse_plan_options(arguments, "--quant")
    if arguments.backend is not None:
        raise ConfigError("--quant excludes --backend: no plans are built; build from the result for these")
    if arguments.dummy:
        raise ConfigError("--quant excludes --dummy: random weights have no quality to measure")
    limit = arguments.max_perplexity_increase
    if arguments.skip_evaluation and limit is not None:
        raise ConfigError("--skip-evaluation excludes --max-perplexity-increase, which needs the evaluation")
    check_evaluation_arguments(arguments)
    QuantConfig(max_perplexity_increase=limit).resolve()
    require_replaceable(arguments.output)
    from llmengine.llm import LLM

    config = ModelConfig(arguments.model, dtype=arguments.dtype, quant=arguments.quant)
    config.parallel_config.tp_size = arguments.tp
    quality: QualityReport | None = None
    with LLM(config) as llm:
        announce(llm)
        if not arguments.skip_evaluation:
            quality = llm.evaluate(
                windows=arguments.windows,
                window_tokens=arguments.window_tokens,
                stride=arguments.stride,
                measure_speed=not arguments.skip_speed,
                progress=True,
            )
            for line in report_lines(quality):
                print(line)
            if limit is not None:
                quality.require(limit)
        llm.save(arguments.output, quality)
    from llmengine import saved_engines

    print(f"{arguments.output}: {size_text(saved_engines.inspect(arguments.output)['size_bytes'])}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from llmengine import saved_engines

    facts = saved_engines.inspect(arguments.directory)
    if arguments.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for name, text in _summary_lines(facts):
        print(f"{name:<12}{text}")
    quality = QualityReport.from_json(facts.get("quality") or {}, f"{arguments.directory}: quality")
    if quality is not None:
        print()
        for line in report_lines(quality):
            print(line)
    if facts.get("plans"):
        from rich.console import Console

        print()
        # Lines are not wrapped in a pipe, since its reader has no width.
        width = None if sys.stdout.isatty() else 200
        Console(width=width, force_terminal=sys.stdout.isatty(), highlight=False, emoji=False, markup=False).print(
            _plan_table(facts)
        )
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from llmengine import saved_engines

    findings = saved_engines.verify(arguments.directory)
    if arguments.json:
        values = {"sound": findings.sound, "files": findings.files, "problems": findings.problems}
        print(json.dumps({**values, "device": findings.device}, indent=2, ensure_ascii=False))
    else:
        for name, problem in findings.files.items():
            print(f"{'ok' if problem is None else 'BAD':<5}{name if problem is None else problem}")
        for problem in findings.problems:
            print(f"{'BAD':<5}{problem}")
        print(f"plans: {findings.device}")
    return 0 if findings.sound else 1


def _summary_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines above the table, as (name, text)."""
    from llmengine.saved_engines import verified

    arch, plans = facts["arch"], facts.get("plans")
    weights = next(entry for name, entry in facts["files"].items() if name.startswith("weights."))
    weight_format = facts["weight_format"]
    lines = [
        ("engine", f"{facts['directory']}, {size_text(facts['size_bytes'])}, format {facts['format_version']}"),
        ("saved by", f"llmengine {facts['llmengine_version']}, torch {facts['torch_version']}"),
        (
            "model",
            f"{arch['architecture']}, {arch['num_layers']} layers, hidden {arch['hidden_size']}, {arch['num_heads']} "
            f"heads ({arch['num_kv_heads']} KV) of {arch['head_dim']}, vocabulary {arch['vocab_size']}, context "
            f"{arch['max_position_embeddings']}",
        ),
        (
            "weights",
            f"{facts['dtype']}, {'not quantized' if weight_format == 'none' else weight_format}, "
            f"{size_text(weights['size_bytes'])}, sha256 {weights['sha256'][:16]}...",
        ),
    ]
    if not plans:
        return [*lines, ("plans", "none; the torch backend needs none, TensorRT builds them while loading")]
    capabilities = ", ".join(f"{value / 10:.1f}" for value in plans["compute_capabilities"])
    device = f", measured on {plans['device_name']}" if plans["device_name"] else ""
    first = next(iter(plans["plans"].values()))["segment"]
    ranks = f", of {plans['tp_size']} ranks" if "tp_size" in plans else ""
    limits = ", ".join(f"{item['name']} to {item['tokens']['max']} tokens" for item in first["profiles"])
    return [
        *lines,
        ("plans", f"{plans['flavour']} {plans['version']}, compute capability {capabilities}{device}{ranks}"),
        ("limits", f"{limits}; weights as {first['weight_mode']}"),
        ("verified", verified(plans["verification"])),
    ]


def _plan_table(facts: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("plan", "size", "build", "peak memory"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=True)
    for name in ("inputs", "weights", "outputs"):
        table.add_column(name)
    for name, plan in facts["plans"]["plans"].items():
        segment, peak = plan["segment"], plan["peak_host_bytes"]
        table.add_row(
            name,
            size_text(facts["files"][f"plans/{name}.plan"]["size_bytes"]),
            f"{plan['build_s']:.2f} s",
            "?" if peak is None else size_text(peak),
            _tensor_list(segment["inputs"]),
            f"{len(segment['weights'])} as {segment['weight_mode']}",
            _tensor_list(segment["outputs"]),
        )
    return table


def _tensor_list(tensors: list[dict[str, Any]]) -> str:
    return "\n".join(f"{item['name']} {item['dtype']} [{', '.join(map(str, item['shape']))}]" for item in tensors)
