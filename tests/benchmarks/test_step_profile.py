"""The profile of a step: what its kernels add to it, in groups and in a layer, and the gaps between them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import step_profile
from benchmarks.step_profile import GROUPS, Launch, group_of, profile_of
from llmengine import kernels


def make_launches(*spans: tuple[str, float, float]) -> list[Launch]:
    return [Launch(*span) for span in spans]


TWO_STEPS = make_launches(
    ("packed_kernel", -5.0, -1.0),  # of a step that began before the profile
    ("_begin_step", 0.0, 1.0),
    ("packed_kernel", 1.0, 6.0),
    ("_decode_kernel", 5.0, 8.0),  # begins before the product ends
    ("_begin_step", 10.0, 11.0),
    ("packed_kernel", 12.0, 19.0),
    ("_begin_step", 20.0, 21.0),
    ("packed_kernel", 21.0, 99.0),  # of a step that has not ended
)


def test_a_step_is_what_its_kernels_add_and_its_gaps() -> None:
    profile = profile_of(reversed(TWO_STEPS))
    assert (profile.num_steps, profile.step_us, profile.gaps_us) == (2, 10.0, 2.0)
    times = {one.name: (one.launches, one.each_us, one.lasts_us, one.step_us) for one in profile.kernels}
    assert times == {
        "packed_kernel": (1.0, 6.0, 6.0, 6.0),
        "_decode_kernel": (0.5, 2.0, 3.0, 1.0),
        "_begin_step": (1.0, 1.0, 1.0, 1.0),
    }
    assert [kernel.name for kernel in profile.kernels] == ["packed_kernel", "_begin_step", "_decode_kernel"]
    assert sum(kernel.step_us for kernel in profile.kernels) + profile.gaps_us == profile.step_us


def test_a_kernel_that_outlasts_the_step_leaves_no_gap() -> None:
    profile = profile_of(make_launches(("_begin_step", 0.0, 12.0), ("_begin_step", 10.0, 11.0)))
    assert (profile.step_us, profile.gaps_us, profile.kernels[0].step_us) == (10.0, 0.0, 10.0)


def test_a_layer_is_what_comes_from_one_attention_to_the_next() -> None:
    layer = [("_decode_kernel", 0.0, 2.0), ("packed_kernel", 0.5, 5.0), ("packed_kernel", 4.0, 9.0)]
    spans = [("_begin_step", 0.0, 1.0)]
    for start in (1.0, 11.0, 21.0):
        spans += [(name, start + begin, start + end) for name, begin, end in layer]
    profile = profile_of(make_launches(*spans, ("_begin_step", 40.0, 41.0)))
    assert [(place.name, place.added_us) for place in profile.layer] == [
        *(("_decode_kernel", 2.0), ("packed_kernel", 3.0), ("packed_kernel", 4.0))
    ]
    assert step_profile.layer_table(profile).splitlines()[-1].split() == ["|", "a", "layer", "|", "9.0", "|"]
    assert profile_of(TWO_STEPS).layer == []


def test_the_tables_name_groups_and_kernels() -> None:
    profile = profile_of(TWO_STEPS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in step_profile.group_table(profile).splitlines()]
    assert rows[2:] == [
        ["attention, rotation, KV write", "0.5", "1.0", "10.0%"],
        ["products", "1.0", "6.0", "60.0%"],
        ["begin and end of the step, copies", "1.0", "1.0", "10.0%"],
        ["gaps", "", "2.0", "20.0%"],
        ["step", "", "10.0", "100.0%"],
    ]
    kernel_rows = step_profile.kernel_table(profile, most=1).splitlines()
    assert [cell.strip() for cell in kernel_rows[2].split("|")[1:-1]] == [
        *("packed_kernel", "products", "1.0", "6.00", "6.00", "6.0")
    ]
    assert len(kernel_rows) == 3


def test_a_profile_needs_a_whole_step() -> None:
    with pytest.raises(SystemExit, match="no whole step ran"):
        profile_of(TWO_STEPS[:4])


def test_every_kernel_of_ours_has_a_group() -> None:
    launched = set()
    directory = Path(kernels.__path__[0])
    for path in directory.glob("*.py"):
        source = path.read_text()
        if "@triton.jit" in source:
            launched |= set(re.findall(r"^def (\w*kernel)\(", source, re.MULTILINE))
            launched |= set(re.findall(r"^ +(_\w+)\[(?:grid|\()", source, re.MULTILINE))
    for path in directory.glob("*.cu"):
        launched |= set(re.findall(r"__global__ .*\s(\w+)\(const", path.read_text()))
    expected = {"_argmax", "_begin_step", "quantize_rows_kernel", "packed_kernel", "_decode_kernel", "hopper_packed"}
    assert expected <= launched
    assert {name: group_of(name) for name in launched if group_of(name) == "other"} == {}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "products"),
        ("Memcpy HtoD (Pinned -> Device)", "begin and end of the step, copies"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0>", "attention, "),
        ("void at::native::vectorized_elementwise_kernel<4>", "other"),
        ("void at::native::vectorized_gather_kernel<16, long>", "other"),
    ],
)
def test_kernels_of_libraries_have_groups(name: str, group: str) -> None:
    assert group_of(name).startswith(group)
    assert group_of(name) in GROUPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_profile_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="a GPU is needed"):
        step_profile.main(["--shape", "tiny"])
