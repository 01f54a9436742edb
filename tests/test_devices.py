"""Devices, dtypes and classes of tensors that our calls are not for are left, with a reason; so are old GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import xfcompile
from xfcompile.kernels import bias_act_dropout, gated_mlp
from xfcompile.kernels.attention import launch_hopper, prepare, programs, supports, tiles
from xfcompile.kernels.gated_mlp import launch_triton
from xfcompile.kernels.gated_mlp.operands import Operands
from xfcompile.report import Report
from xfcompile.score import S
from xfcompile.site import ScoreSpec


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 8, -1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.mT), -1) @ v


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def activated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.dropout(F.gelu(F.linear(x, weight, bias)), 0.1)


QKV = ((1, 2, 16, 32),) * 3
PROGRAMS: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[int, ...]]]] = {
    "attention": (attention, QKV),
    "capped": (capped, QKV),
    "gated_mlp": (gated, ((16, 32),) * 3),
    "bias-act-dropout": (activated, ((16, 32), (32, 32), (32,))),
}
ROUTES: list[dict[str, str]] = [
    {},
    {"attention": "triton", "gated_mlp": "triton", "bias-act-dropout": "triton"},
    {"attention": "sdpa", "gated_mlp": "cublas", "bias-act-dropout": "epilogue"},
]


def rewritten(
    fn: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    routes: Mapping[str, str],
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (),
) -> tuple[Report, str]:
    """What becomes of a program whose inputs are on a device that need not be here."""
    every = [*dtypes, *[torch.float32] * (len(shapes) - len(dtypes))]
    with FakeTensorMode():
        inputs = [torch.empty(n, device=device, dtype=dtype) for n, dtype in zip(shapes, every, strict=True)]
    gm = torch.fx.symbolic_trace(fn)
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta["example_value"] = x
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        report = xfcompile.rewrite(gm, inputs, {"strict": True, "routes": routes})
    return report, gm.code


@pytest.mark.parametrize("routes", ROUTES, ids=["usual", "triton", "others"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_other_devices_are_left(
    device: str, program: str, routes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fn, shapes = PROGRAMS[program]
    before = torch.fx.symbolic_trace(fn).code
    report, code = rewritten(fn, shapes, routes, device)
    (site,) = report.sites
    assert site.route == "inductor" and code == before
    known = ("not linear in q·k", "two weights", "a weight each")  # which hold anywhere
    assert device in str(site.reason) or any(words in str(site.reason) for words in known), site.reason


@pytest.mark.parametrize("routes", ROUTES, ids=["usual", "triton", "others"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_declined(
    dtype: torch.dtype, program: str, routes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fn, shapes = PROGRAMS[program]
    before = torch.fx.symbolic_trace(fn).code
    report, code = rewritten(fn, shapes, routes, dtypes=[dtype] * 3)
    assert code == before
    for site in report.sites:
        assert site.route == "inductor"
        if routes.get(site.family) == "triton":
            assert str(dtype).removeprefix("torch.") in str(site.reason)
    assert len(report.sites) == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_score_that_loads_fp8_is_declined(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def masked(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(q @ k.mT).masked_fill(x == 0, -3e4).softmax(-1) @ v

    shapes = (*QKV, (1, 2, 16, 16))
    for x, route in ((dtype, "inductor"), (torch.float16, "triton")):
        (site,) = rewritten(masked, shapes, ROUTES[1], dtypes=[torch.float32] * 3 + [x])[0].sites
        assert site.route == route
        assert route == "triton" or "float8" in str(site.reason)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("route", ["sdpa", "triton"])
def test_fp8_that_the_program_widens_is_matched(
    route: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache in fp8, say: the product is of wider numbers, which are what the call is given."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k.float(), v.float())

    q, k, v = (torch.randn(n, generator=torch.Generator().manual_seed(0)) for n in QKV)
    k, v = k.to(dtype), v.to(dtype)
    with xfcompile.collect() as report:
        found = torch.compile(widened, backend=xfcompile.xformers, options={"routes": {"attention": route}})(q, k, v)
    assert [site.route for site in report.sites] == [route]
    torch.testing.assert_close(found, widened(q, k, v))


def test_tensors_of_other_classes_are_declined() -> None:
    """Which say themselves what an operation does: here to each of two tensors."""

    def pair(*shape: int) -> TwoTensor:
        return TwoTensor(torch.randn(shape), torch.randn(shape))

    for name in ("capped", "gated_mlp"):
        torch._dynamo.reset()
        fn, shapes = PROGRAMS[name]
        inputs = [pair(*shape) for shape in shapes]
        with xfcompile.collect() as report, warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = torch.compile(fn, backend=backend)(*inputs)
        assert [(site.route, site.reason) for site in report.sites] == [
            (None, "it computes with tensors of the class TwoTensor")
        ]
        for part in ("a", "b"):
            torch.testing.assert_close(getattr(found, part), fn(*(getattr(x, part) for x in inputs)))


def backend(gm: Any, inputs: Any) -> Any:
    return xfcompile.xformers(gm, inputs)


def test_nested_tensors_are_left() -> None:
    def ragged(*shape: int) -> Tensor:
        rows = [torch.randn(n, *shape) for n in (5, 9, 3)]
        return torch.nested.nested_tensor(rows, layout=torch.jagged)

    x, weights = ragged(16), [torch.randn(32, 16) for _ in range(2)]
    with xfcompile.collect() as report, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = torch.compile(gated, backend=backend)(x, *weights)
    assert not any(site.replaced for site in report.sites) and report.failures == []
    torch.testing.assert_close(found.values(), gated(x, *weights).values())


# -- what only some GPUs have ---------------------------------------------------------------------------------------


def pretend(patch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    patch.setattr(tiles, "capability", lambda index: capability)
    patch.setattr(torch.version, "hip", hip)


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_gpus_before_ampere_are_declined_by_all_families(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    half = torch.float16
    said = [
        supports(CUDA, half, 64, 64),
        gated_mlp.supports(CUDA, half),
        bias_act_dropout.supports(CUDA, [half]),
    ]
    assert said == ["the kernel needs compute capability 8.0 or higher"] * 3
    pretend(monkeypatch, (8, 0))
    assert supports(CUDA, half, 64, 64) is None
    assert gated_mlp.supports(CUDA, half) is bias_act_dropout.supports(CUDA, [half]) is None
    pretend(monkeypatch, (9, 4), hip="6.0")
    assert supports(CUDA, half, 64, 64) is None


@pytest.mark.parametrize("dim", [1, 36, 40])
def test_results_that_cuda_pads_have_no_gaps(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0))
    report, code = rewritten(attention, ((1, 2, 16, dim),) * 3, {"attention": "sdpa"}, "cuda", (torch.bfloat16,) * 3)
    assert [site.route for site in report.sites] == ["sdpa"]
    assert ("clone" in code) == (dim != 40), "FlashAttention pads rows to multiples of 16 bytes"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (9, 4)])
def test_what_only_hopper_has_is_asked_of_hopper_only(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    amd = "6.0" if capability == (9, 4) else None  # what ROCm says of gfx942
    pretend(monkeypatch, capability, amd)
    prepared = programs.program(prepare(ScoreSpec(S / 8)))
    reason = launch_hopper.why_not(prepared, CUDA, torch.bfloat16, 64, 64)
    assert (reason == "it is for Hopper") == (capability != (9, 0)), reason
    kind = tiles.device_generation(CUDA)
    assert kind == {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}[capability[0]] if amd is None else "gfx942"
    operands = Operands(*(torch.empty(1, 64, 64, dtype=torch.bfloat16) for _ in range(3)), None, None)
    through_tma = launch_triton._described(operands, kind)
    assert through_tma == (amd is None and capability[0] in (9, 10))
