"""The binding to cuBLASLt: against a stand-in that takes the arguments apart, and on a GPU against torch."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmengine.kernels import cublaslt
from llmengine.kernels.cublaslt import CLUSTERS, TILES, CublasConfig, CublasLt, Product, TileConfig

PRODUCT = Product(3, 8, 16, torch.float32, torch.float32, accumulate=False, bias=None)


class StandIn:
    """The library's calls on host memory: it keeps the contents of descriptors, and computes their products with torch.

    Attributes:
        refused: algorithms that `cublasLtMatmulAlgoCheck` refuses.
        rigid: algorithms that have no attributes.
        used: the algorithm of each product.
        settings: the attributes that it had been given, of each product.
    """

    def __init__(self, num_proposals: int = 3) -> None:
        self.num_proposals = num_proposals
        self.refused: set[int] = set()
        self.rigid: set[int] = set()
        self.used: list[int] = []
        self.settings: list[dict[int, int]] = []
        self._configs: list[dict[int, int]] = [{}]
        self.num_destroyed = 0
        self._descs: dict[int, dict[int, bytes]] = {}
        self._layouts: dict[int, tuple[int, int, int, int]] = {}

    def cublasLtCreate(self, handle: Any) -> int:
        handle._obj.value = 1
        return 0

    def cublasLtDestroy(self, handle: Any) -> int:
        self.num_destroyed += 1
        return 0

    def cublasLtMatmulDescCreate(self, desc: Any, compute: Any, scale: Any) -> int:
        assert (compute.value, scale.value) == (68, 0), "products accumulate in fp32"
        desc._obj.value = 100 + len(self._descs)
        self._descs[desc._obj.value] = {}
        return 0

    def cublasLtMatmulDescSetAttribute(self, desc: Any, name: Any, value: Any, size: Any) -> int:
        assert size.value == ctypes.sizeof(value._obj)
        self._descs[desc.value][name.value] = bytes(value._obj)
        return 0

    def cublasLtMatrixLayoutCreate(self, layout: Any, kind: Any, rows: Any, columns: Any, leading: Any) -> int:
        layout._obj.value = 200 + len(self._layouts)
        self._layouts[layout._obj.value] = (kind.value, rows.value, columns.value, leading.value)
        return 0

    def cublasLtMatmulPreferenceCreate(self, preference: Any) -> int:
        preference._obj.value = 7
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, preference: Any, name: Any, value: Any, size: Any) -> int:
        assert (preference.value, name.value, size.value) == (7, 1, 8)
        return 0

    def cublasLtMatmulPreferenceDestroy(self, preference: Any) -> int:
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle: Any, *rest: Any) -> int:
        wanted, found, count = rest[-3:]
        num_rows = self._layouts[rest[2].value][2]
        for index in range(min(wanted.value, self.num_proposals)):
            found[index].algo[0] = num_rows * 10 + index
        count._obj.value = min(wanted.value, self.num_proposals)
        return 0

    def cublasLtMatmulAlgoConfigSetAttribute(self, algorithm: Any, name: Any, value: Any, size: Any) -> int:
        assert size.value == (2 if name.value == 8 else 4), "a cluster's number has 16 bits"
        number, config, *_ = algorithm._obj
        self._configs.append({**self._configs[config], name.value: value._obj.value})
        algorithm._obj[1] = len(self._configs) - 1
        return 7 if number in self.rigid else 0

    def cublasLtMatmulAlgoCheck(self, *arguments: Any) -> int:
        return 15 if arguments[6]._obj[0] in self.refused else 0

    def cublasLtMatmul(self, handle: Any, desc: Any, *rest: Any) -> int:
        _, weight, weight_layout, x, x_layout, beta, out, out_layout, same, same_layout, algorithm, *_ = rest
        assert (out.value, out_layout.value) == (same.value, same_layout.value)
        assert int.from_bytes(self._descs[desc.value][3], "little") == 1, "the weight is transposed"

        attributes = {name: int.from_bytes(value, "little") for name, value in self._descs[desc.value].items()}

        def numbers(address: int, count: int) -> torch.Tensor:
            return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)

        def matrix(address: Any, layout: Any, scale: int) -> torch.Tensor:
            kind, rows, columns, leading = self._layouts[layout.value]
            assert leading == rows, "contiguous"
            if kind == 28:
                data = (ctypes.c_uint8 * (rows * columns)).from_address(address.value)
                values = torch.frombuffer(data, dtype=torch.float8_e4m3fn).float().view(columns, rows)
                return values * numbers(attributes[scale], columns if attributes.get(scale + 14) == 3 else 1).view(
                    -1, 1
                )
            assert kind == 0, "fp32"
            return numbers(address.value, rows * columns).view(columns, rows)

        result = matrix(out, out_layout, 0)
        product = matrix(x, x_layout, 18) @ matrix(weight, weight_layout, 17).T
        if attributes[7] == 4:
            product += numbers(attributes[8], result.shape[1])
        result.copy_(product + beta._obj.value * result)
        self.used.append(algorithm._obj[0])
        self.settings.append(self._configs[algorithm._obj[1]])
        return 0


@pytest.fixture
def make_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[StandIn], CublasLt]:
    def make(stand_in: StandIn) -> CublasLt:
        monkeypatch.setattr(cublaslt.ctypes, "PyDLL", lambda name: stand_in)

        class NoStream:
            cuda_stream = 0

        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: NoStream)
        return CublasLt("cpu")

    return make


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_descriptors_say_what_the_product_is(
    make_library: Callable[[StandIn], CublasLt], accumulate: bool, with_bias: bool
) -> None:
    library = make_library(StandIn())
    product = Product(3, 8, 16, torch.float32, torch.float32, accumulate, torch.float32 if with_bias else None)
    for _ in range(2):  # the second finds its descriptors, and has another bias
        x, weight, bias, out = (torch.randn(*shape) for shape in ((3, 16), (8, 16), (8,), (3, 8)))
        expected = x @ weight.T + (bias if with_bias else 0) + (out if accumulate else 0)
        library.run(product, x, weight, bias if with_bias else None, out)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("one_scale", [False, True])
def test_operands_in_fp8_have_scales(make_library: Callable[[StandIn], CublasLt], one_scale: bool) -> None:
    library = make_library(StandIn())
    product = Product(3, 8, 16, torch.float8_e4m3fn, torch.float32, True, None, one_scale=one_scale)
    for _ in range(2):  # the second finds its descriptors, and has other scales
        x, weight = (torch.randn(rows, 16).to(torch.float8_e4m3fn) for rows in (3, 8))
        scales = torch.rand(1 if one_scale else 3), torch.rand(1 if one_scale else 8)
        out = torch.randn(3, 8)
        expected = (x.float() * scales[0].view(-1, 1)) @ (weight.float() * scales[1].view(-1, 1)).T + out
        library.run(product, x, weight, None, out, scales=scales)
        torch.testing.assert_close(out, expected)


def test_a_library_that_knows_no_scales_of_rows_has_no_algorithm(make_library: Callable[[StandIn], CublasLt]) -> None:
    stand_in = StandIn()
    keep = stand_in.cublasLtMatmulDescSetAttribute
    stand_in.cublasLtMatmulDescSetAttribute = (  # type: ignore[method-assign]
        lambda desc, name, *rest: 7 if name.value == 31 else keep(desc, name, *rest)
    )
    library = make_library(stand_in)
    product = Product(3, 8, 16, torch.float8_e4m3fn, torch.float32, False, None)
    assert library.num_algorithms(product) == 0
    assert library.num_algorithms(replace(product, one_scale=True)) == 3


def test_products_in_fp8_take_no_float32_bias(make_library: Callable[[StandIn], CublasLt]) -> None:
    library = make_library(StandIn())
    product = Product(3, 8, 16, torch.float8_e4m3fn, torch.float32, False, torch.float32)
    assert library.num_algorithms(product) == 0
    with pytest.raises(RuntimeError, match="no algorithm"):
        library.run(product, *(torch.zeros(rows, 16).to(torch.float8_e4m3fn) for rows in (3, 8)), *torch.ones(2, 3, 8))
    for bias in (torch.bfloat16, None):
        assert library.num_algorithms(replace(product, bias=bias)) == 3
    assert library.num_algorithms(replace(product, dtype=torch.float32)) == 3


def test_proposals_for_another_number_of_rows_are_taken_where_they_can_compute_this_one(
    make_library: Callable[[StandIn], CublasLt],
) -> None:
    stand_in = StandIn()
    library = make_library(stand_in)
    x, weight, out = torch.randn(3, 16), torch.randn(8, 16), torch.empty(3, 8)
    assert library.num_algorithms(PRODUCT) == 3
    for index, num_rows in ((0, 0), (2, 0), (9, 0), (1, 64)):
        library.run(PRODUCT, x, weight, None, out, CublasConfig(index, num_rows))
    stand_in.refused = {642}
    library.run(PRODUCT, x, weight, None, out, CublasConfig(2, 64))
    assert stand_in.used == [30, 32, 30, 641, 30]


def test_a_tile_is_given_to_the_first_proposal_that_can_have_it(make_library: Callable[[StandIn], CublasLt]) -> None:
    stand_in = StandIn()
    stand_in.rigid, stand_in.refused = {30}, {31}
    library = make_library(stand_in)
    x, weight, out = torch.randn(3, 16), torch.randn(8, 16), torch.empty(3, 8)
    library.run(PRODUCT, x, weight, None, out, TileConfig((96, 128), (2, 1)))
    # cublasLt.h: attributes 1 and 8 are tile and cluster, 2 to 5 split K, its reduction, swizzling, custom option.
    assert stand_in.settings == [{1: 28, 8: 3, 2: 1, 3: 0, 4: 0, 5: 0}]
    library.run(PRODUCT, x, weight, None, out)
    stand_in.refused = {31, 32}
    library.run(PRODUCT, x, weight, None, out, TileConfig((64, 64), (1, 1)))
    assert stand_in.used == [32, 30, 30]
    assert stand_in.settings[1:] == [{}, {}], "proposals stay as they are"


def test_failures_name_the_call_and_the_product(make_library: Callable[[StandIn], CublasLt]) -> None:
    with pytest.raises(RuntimeError, match=r"no algorithm for Product\(m=3, n=8"):
        make_library(StandIn(num_proposals=0)).run(
            PRODUCT, torch.randn(3, 16), torch.randn(8, 16), None, torch.empty(3, 8)
        )
    stand_in = StandIn()
    library = make_library(stand_in)
    stand_in.cublasLtMatmul = lambda *_: 13  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"cublasLtMatmul of Product.*: cuBLAS status 13"):
        library.run(PRODUCT, torch.randn(3, 16), torch.randn(8, 16), None, torch.empty(3, 8))


def test_the_handle_goes_with_its_owner(make_library: Callable[[StandIn], CublasLt]) -> None:
    stand_in = StandIn()
    library = make_library(stand_in)
    assert stand_in.num_destroyed == 0
    del library
    assert stand_in.num_destroyed == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="calls the library")
@pytest.mark.parametrize("num_rows", [1, 5, 64, 300])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_proposal_computes_the_product(num_rows: int, out_dtype: torch.dtype) -> None:
    library = CublasLt("cuda")
    x, weight = (torch.randn(rows, 512, device="cuda").bfloat16() for rows in (num_rows, 384))
    start = torch.randn(num_rows, 384, device="cuda").to(out_dtype)
    expected = x.float() @ weight.float().T + start.float()
    product = Product(num_rows, 384, 512, torch.bfloat16, out_dtype, accumulate=True, bias=None)
    for index in range(library.num_algorithms(product)):
        out = start.clone()
        library.run(product, x, weight, None, out, CublasConfig(index, num_rows=64))
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="calls the library")
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_every_tile_computes_the_product(out_dtype: torch.dtype) -> None:
    library = CublasLt("cuda")
    x, weight = (torch.randn(rows, 512, device="cuda").bfloat16() for rows in (300, 1104))
    start = torch.randn(300, 1104, device="cuda").to(out_dtype)
    expected = x.float() @ weight.float().T + start.float()
    product = Product(300, 1104, 512, torch.bfloat16, out_dtype, accumulate=True, bias=None)
    for tile, cluster in itertools.product(TILES, CLUSTERS):
        out = start.clone()
        library.run(product, x, weight, None, out, TileConfig(tile, cluster))
        torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.3)
