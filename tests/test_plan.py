"""Which route a site takes on a GPU, decided from the site alone: no GPU is needed to ask."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from xfcompile.score import B, H, I, J, Load, S, Where

plan = importlib.import_module("xfcompile.plan")

BIASED = plan.Told(sympy.S.One, sympy.Symbol("bias"), False, sympy.true)


def objection(
    keys: Any, *, bias_grad: bool = True, device: str = "cuda", words: Any = BIASED, **fields: Any
) -> str | None:
    site = SimpleNamespace(
        call=None, dead="nan", alive=True, root=SimpleNamespace(dtype=torch.bfloat16), head_dim=64, value_dim=64,
        dropout=0.0, keys=keys, rounding=None, full=None,
    )  # fmt: skip
    vars(site).update(fields)
    return plan._why_no_sdpa(site, words, device, bias_grad)  # type: ignore[no-any-return]


@pytest.mark.parametrize("keys", [1024, sympy.Integer(257), sympy.Symbol("s0", integer=True)])
def test_sdpa_leaves_long_biases_that_need_a_gradient_to_inductor(keys: Any) -> None:
    assert "slower" in (objection(keys) or "")
    assert objection(keys, bias_grad=False) is None
    assert objection(keys, call=object()) is None  # the program's own call of SDPA stays one


def test_sdpa_takes_short_biases_that_need_a_gradient() -> None:
    assert objection(144) is None
    assert objection(256) is None


def windows(dtype: torch.dtype = torch.bfloat16, keys: int = 144, dim: int = 32, value_dim: int = 32) -> Any:
    site = SimpleNamespace(queries=sympy.Integer(keys), keys=sympy.Integer(keys), head_dim=dim, value_dim=value_dim)
    return SimpleNamespace(**vars(site), root=SimpleNamespace(dtype=dtype), call=object())


def test_windows_with_learned_biases_are_a_class_of_their_own() -> None:
    bias = plan.Told(sympy.S.One, Load(0, H, I, J), False, sympy.true)
    assert plan.shape_class(windows(), bias, True) == "learned bias, windows"
    assert plan.shape_class(windows(), bias, False) == "other"  # at inference
    for site in (windows(dim=64, value_dim=64), windows(value_dim=16), windows(torch.float32)):
        assert plan.shape_class(site, bias, True) == "learned bias, few keys"
    assert plan.shape_class(windows(keys=272), bias, True) == "other"
    kinds = {kind: fact.value for (kind, name), fact in plan.ROUTES.items() if name == "learned bias, windows"}
    assert kinds == {"sm_90": ("triton", "sdpa"), "cpu": ("sdpa",)} | dict.fromkeys(
        ("sm_80", "sm_100", "gfx942"), ("sdpa", "triton")
    )


def test_sdpa_may_refuse_what_it_does_not_compute_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
    assert "switched off" in (objection(144) or "")
    assert objection(144, call=object()) is None  # it is the program's own


def test_sdpa_drops_out_on_gpus_alone() -> None:
    assert "drops no weights out" in (objection(144, bias_grad=False, device="cpu", dropout=0.1) or "")
    assert objection(144, bias_grad=False, dropout=0.1) is None


def load(dtype: torch.dtype) -> Any:
    return SimpleNamespace(dtype=dtype)


@pytest.mark.parametrize(
    ("rest", "dtype"),
    [
        (sympy.Float(0.37) * (J - I), torch.bfloat16),
        (Load(0, H) * (J - I), torch.bfloat16),
        (Load(0, H, I, J), torch.float32),
        (Load(0, H, J) + sympy.Float(-1e9), torch.float64),
    ],
    ids=["a slope", "learned slopes", "fp32", "fp64"],
)
def test_biases_of_more_digits_are_not_rounded_for_sdpa_on_gpus(rest: Any, dtype: torch.dtype) -> None:
    words = plan.Told(sympy.S.One, rest, False, sympy.true)
    about = {"words": words, "bias_grad": False, "loads": (load(dtype),)}
    assert "takes biases in bfloat16" in (objection(4096, **about) or "")
    assert objection(4096, **about, call=object()) is None  # the program's own
    assert objection(4096, **about, root=SimpleNamespace(dtype=torch.float32)) is None
    assert objection(4096, **about, device="cpu", lead=(B, H)) is None  # there they are added in fp32


@pytest.mark.parametrize(
    ("rest", "dtype"),
    [
        (Load(0, H, I, J), torch.bfloat16),
        (Where(J <= I, sympy.S.Zero, sympy.Float(-1e9)), torch.bfloat16),
        (Where(sympy.Ne(Load(0, B, J), 0), sympy.S.Zero, sympy.Float(-1e9)), torch.bool),
        (Load(0, Load(1, I, J), H), torch.bfloat16),
    ],
    ids=["bf16", "a mask of positions", "a mask", "looked up"],
)
def test_biases_of_as_many_digits_are_sdpas_on_gpus(rest: Any, dtype: torch.dtype) -> None:
    words = plan.Told(sympy.S.One, rest, False, sympy.true)
    assert objection(4096, words=words, bias_grad=False, loads=(load(dtype), load(torch.int64))) is None


def test_a_bias_that_is_larger_than_what_it_is_made_of_is_not_made_on_cpus() -> None:
    """Of a table by batch and one by head: one of all scores."""
    words = plan.Told(sympy.S.One, Load(0, B, J) + Load(1, H, J), False, sympy.true)
    outer = sympy.symbols("p0 p1", integer=True)
    assert "the size of all scores" in (
        objection(64, bias_grad=False, device="cpu", words=words, lead=(*outer, H)) or ""
    )
    assert objection(64, bias_grad=False, device="cpu", words=words, lead=(B, H)) is None


def test_sdpa_drops_no_weights_of_rows_without_keys_out() -> None:
    """It gives them none, and the mean of all values is put there; our kernel drops them out."""
    rows = {"dropout": 0.25, "dead": "mean", "bias_grad": False}
    assert "dropped out too" in (objection(144, alive=False, **rows) or "")
    assert objection(144, alive=True, **rows) is None
    root = SimpleNamespace(meta=SimpleNamespace(device=torch.device("cpu")))
    site = SimpleNamespace(dropout=0.25, dead="mean", alive=False, root=root, sizes=(2, 3))
    assert "interpreted" in plan._why_no_kernel(site, S, None, False, False)


CACHED = sympy.Ne(Load(0, B, 0, 0, J), 0)


def route(monkeypatch: pytest.MonkeyPatch, device: str = "cuda", **fields: Any) -> Any:
    """Of one query against a long cache; a kernel and SDPA could both run it."""
    monkeypatch.setattr(plan, "_why_no_kernel", lambda *site: None)
    root = SimpleNamespace(dtype=torch.bfloat16, meta=SimpleNamespace(device=torch.device(device)))
    site = SimpleNamespace(
        family="attention", root=root, queries=1, keys=8192, head_dim=64, value_dim=64, lead=(B, H), sink=None,
        loads=(), keep=CACHED, full=None, call=None, leaks=False, dead="nan", alive=True, dropout=0.0, rounding=None,
    )  # fmt: skip
    vars(site).update(fields)
    return plan.choose(site, S / 8, training=False, bias_grad=False, forced={})[0]


@pytest.mark.parametrize("keys", [8192, sympy.Symbol("s0", integer=True)])
def test_a_step_against_a_masked_cache_is_our_kernels(keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = route(monkeypatch, keys=keys)
    assert chosen.name == "triton"
    assert "split" in chosen.reason
    assert route(monkeypatch, keys=keys, queries=8192).reason is None


def test_a_step_without_a_mask_is_sdpas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert route(monkeypatch, keep=sympy.true) == plan.Route("sdpa")
    monkeypatch.setitem(plan.ROUTES, ("sm_90", "plain, few queries"), plan.Fact(("triton", "sdpa")))
    assert route(monkeypatch, keep=sympy.true).name == "triton"
    assert route(monkeypatch, keep=sympy.true, queries=8192) == plan.Route("sdpa")


def test_a_step_that_takes_a_second_pass_is_not_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = route(monkeypatch, full=S / 8)
    assert chosen.name == "sdpa"
    assert "does not split" in chosen.reason
    assert route(monkeypatch, full=S / 8, queries=8192).name == "triton"


@pytest.mark.parametrize(
    ("keys", "distances", "name"), [(256, False, "sdpa"), (256, True, "triton"), (1024, True, "triton")]
)
def test_learned_distances_are_our_kernels(
    keys: int, distances: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDPA's fused kernels take no mask as T5's table has it in memory, in its own calls either."""
    monkeypatch.setattr(plan, "_why_no_kernel", lambda *site: None)
    root = SimpleNamespace(dtype=torch.bfloat16, meta=SimpleNamespace(device=torch.device("cuda")))
    site = SimpleNamespace(
        family="attention", root=root, queries=keys, keys=keys, head_dim=64, value_dim=64, lead=(B, H), sink=None,
        loads=(), keep=sympy.true, full=None, call=object(), leaks=False, dead="zero", alive=True, dropout=0.1,
        rounding=None,
    )  # fmt: skip
    about = {"training": True, "bias_grad": True, "distances": distances, "forced": {}}
    assert plan.choose(site, S + Load(0, H, I, J), **about)[0].name == name


MASK = Load(0, B, 0, I, J)


def own_mask(monkeypatch: pytest.MonkeyPatch, keys: Any = 256, **fields: Any) -> Any:
    """Of the program's own call of SDPA with a mask."""
    keep = fields.pop("keep", sympy.Ne(MASK, 0))
    return route(monkeypatch, **{"queries": keys, "keys": keys, "keep": keep, "call": object()} | fields)


def test_a_call_of_few_keys_with_a_mask_of_which_nothing_is_known_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = own_mask(monkeypatch)
    assert (chosen.name, chosen.reason) == ("sdpa", "nothing is known of its mask, and there are no more than 256 keys")


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": 257},
        {"keys": sympy.Symbol("s0", integer=True)},
        {"call": None},
        {"keep": sympy.Ne(Load(0, B, 0, 0, J), 0)},
        {"keep": sympy.Ne(MASK, 0) & (J <= I)},
        {"keep": sympy.Ne(Load(0, I - J + 255), 0)},
        {"keep": sympy.Ne(Load(0, B, 0, J, I), 0)},
        {"queries": 1},
    ],
    ids=["more keys", "unknown", "eager", "padding", "causal too", "of distances", "transposed", "a step"],
)
def test_other_masks_of_few_keys_are_our_kernels(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is known of them tiles are left out, or no mask of the size of the scores is made."""
    assert own_mask(monkeypatch, **fields).name == "triton"
