"""Calibration in a process of its own: Ctrl-C, and the memory that it takes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.backends.helpers import save_tiny
from tests.memory import output_in_steady_heap
from tests.terminal import interrupt

INTERRUPTED = """
import sys, threading
from llmengine import LLM, ModelConfig, QuantConfig

prompts = [[3 + (7 * index + position) % 90 for position in range(60)] for index in range(10000)]
config = QuantConfig.preset("int4-awq", group_size=16, calibration_prompts=prompts, num_calibration_samples=10000)
try:
    LLM(ModelConfig(sys.argv[1], device="cpu", quant_config=config), enable_tokenizer=False)
except KeyboardInterrupt:
    print(*(thread.name for thread in threading.enumerate()))
    raise
"""


def test_ctrl_c_while_an_llm_calibrates_leaves_no_thread(tmp_path: Path) -> None:
    """Interrupted in the first layer, with ten thousand texts to go."""
    save_tiny(tmp_path)
    ended = interrupt([sys.executable, "-c", INTERRUPTED, str(tmp_path)], "calibrating")
    assert ended.return_code == -signal.SIGINT
    assert ended.printed.split() == ["MainThread"]
    assert ended.shown.rstrip().endswith("KeyboardInterrupt")
    assert ended.shows_cursor


MEMORY = """
import sys
from pathlib import Path
import torch
from llmengine import QuantConfig
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source

def resident(what):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) << 10

def run(directory):
    prompts = [[3 + (7 * index + position) % 90 for position in range(100)] for index in range(4)]
    config = QuantConfig.preset(sys.argv[3], calibration_prompts=prompts, num_calibration_samples=4).resolve()
    for _ in quantized_source(open_model(Path(directory)), config).weights(torch.bfloat16):
        pass

torch.set_num_threads(1)
run(sys.argv[1])  # loads what has to be loaded
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
run(sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak of a process")
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int4-awq", "int4-gptq", "fp8-gptq", "w8a8"])
def test_memory_is_that_of_two_layers_and_the_second_moments(tmp_path: Path, preset: str) -> None:
    """Layers count as float32."""
    hidden, wide = 512, 1792
    save_tiny(tmp_path / "small")
    shape = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": 4}
    save_tiny(tmp_path / "wide", num_attention_heads=8, num_key_value_heads=2, head_dim=64, **shape)
    found = int(output_in_steady_heap(MEMORY, str(tmp_path / "small"), str(tmp_path / "wide"), preset))
    layer, moments = 4 * hidden * (768 + hidden + 3 * wide), 4 * (3 * hidden**2 + wide**2)
    mapped = (tmp_path / "wide" / "model.safetensors").stat().st_size
    print(f"{preset}: {found >> 20} MiB, {mapped >> 20} of the file, {layer >> 20} a layer, {moments >> 20} moments")
    assert found < mapped + 2 * layer + moments
