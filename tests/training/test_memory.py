"""What is kept for a backward, and what a step makes on its way: nothing that has an element for each query and key."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from step import OPTIONS, numbers, qkv
from test_gradients import alibi, clipped, sinks, soft_cap, t5, temperature
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import xfcompile
from xfcompile.kernels.attention import launch, launch_backward, prepare
from xfcompile.kernels.attention.backward_layout import Needs

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
cases = importlib.import_module("attention_cases")

LQ, LK = 19, 23
LEAST = torch.finfo(torch.float32).min


# -- whole programs -------------------------------------------------------------------------------------------------


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (q @ k.mT * 0.25).masked_fill((j > i) | (j < i - 5), -math.inf).softmax(-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    i, j = positions(q, k)
    keep = (document[:, None, :LQ, None] == document[:, None, None, :]) & (j <= i)
    return (q @ k.mT * 0.25).masked_fill(~keep, -math.inf).softmax(-1) @ v


def prefix(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    i, j = positions(q, k)
    keep = (j <= i) | (j < length[:, None, None, None])
    return (q @ k.mT * 0.25).masked_fill(~keep, -math.inf).softmax(-1) @ v


def offset(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
    i, j = positions(q, k)
    return (q @ k.mT * 0.25).masked_fill(j > i + start[:, None, None, None], -math.inf).softmax(-1) @ v


def padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(~keep[:, None, None, :], LEAST).softmax(-1) @ v


def padding_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + torch.where(keep[:, None, None, :], 0.0, LEAST)).softmax(-1) @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.25).softmax(-1), 0.25) @ v


def dropped_alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    i, j = positions(q, k)
    return F.dropout((q @ k.mT * 0.25 - slopes[:, None, None] * (i - j).abs()).softmax(-1), 0.25) @ v


def bias_of_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + bias[:, None, None, :]).softmax(-1) @ v


def shared_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


KEPT = torch.arange(LK) < torch.tensor([[LK], [11]])
PROGRAMS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "plain": (plain, []),
    "window": (window, []),
    "documents": (documents, [(torch.arange(LK) // 6).expand(2, -1).clone()]),
    "prefix": (prefix, [torch.tensor([3, 8])]),
    "offset": (offset, [torch.tensor([0, 4])]),
    "padding": (padding, [KEPT]),
    "padding, added": (padding_added, [KEPT]),
    "dropout": (dropped, []),
    "dropout, ALiBi": (dropped_alibi, [numbers(2, seed=9)]),
    "bias of keys": (bias_of_keys, [numbers(2, LK, seed=9)]),
    "ALiBi": (alibi, [numbers(2, seed=9)]),
    "temperature": (temperature, [numbers(1, seed=9)]),
    "sinks": (sinks, [numbers(2, seed=9)]),
    "T5": (t5, [numbers(16, 2, seed=9)]),
    "clipped": (clipped, [numbers(15, 2, seed=9)]),
    "soft-cap, bias of keys": (soft_cap, [numbers(LK, seed=9)]),
}


def traced(program: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward that AOTAutograd makes of a rewritten program, after they have run."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        report = xfcompile.rewrite(gm, examples, OPTIONS["kernel"])
        assert [site.route for site in report.sites] == ["triton"], report
        run = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        return run(gm, examples)

    out = torch.compile(program, backend=backend)(*inputs)
    out.square().sum().backward()
    forward, backward = found
    return forward, backward


def values(gm: fx.GraphModule, *ops: str) -> list[Tensor]:
    found = pytree.tree_leaves([n.meta.get("val") for n in gm.graph.nodes if n.op in ops])
    return [x for x in found if isinstance(x, torch.Tensor)]


def squares(made: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Those with an element for each query and key, flattened or not."""
    return [tuple(x.shape) for x in made if x.numel() and x.numel() % (LQ * LK) == 0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_of_a_step_has_an_element_for_each_query_and_key(name: str, interpreter: None) -> None:
    program, more = PROGRAMS[name]
    for graph in traced(program, [*qkv(), *more]):
        assert squares(values(graph, "placeholder", "call_function")) == []


@pytest.mark.parametrize("name", [*PROGRAMS, "bias of each score", "bias of each score, dropout"])
def test_what_is_kept_is_q_k_v_the_result_its_log_sum_exps_and_what_is_loaded(name: str, interpreter: None) -> None:
    def dropped_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.dropout((q @ k.mT * 0.25 + bias).softmax(-1), 0.25) @ v

    bias = [numbers(1, 2, LQ, LK, seed=9)]
    scores = {"bias of each score": (shared_bias, bias), "bias of each score, dropout": (dropped_bias, bias)}
    program, more = {**PROGRAMS, **scores}[name]
    inputs = [*qkv(), *more]
    _, backward = traced(program, inputs)
    given = values(backward, "placeholder")
    seeds = [x for x in given if x.dtype == torch.int64 and x.shape == (1,)]
    assert len(seeds) == ("dropout" in name)
    q, k, v, *loaded = inputs
    result = q.numel()
    of_the_op = q.numel() + k.numel() + v.numel() + result + 2 * 2 * LQ + result  # the last is the result's gradient
    # Vectors of distances, and where in a table they are; less than a bit for each weight.
    few = 4 * (LQ + LK)
    assert few < 2 * 2 * LQ * LK / 8
    assert sum(x.numel() for x in given) <= of_the_op + sum(x.numel() for x in loaded) + few, [x.shape for x in given]


# -- the op and its kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "padding_zero", "alibi", "bias_hij", "sink"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_autograd_keeps_no_weights(name: str, dropout: float, interpreter: None) -> None:
    """Where nothing but autograd runs the op: the very tensors that it was given, and its two results."""
    case = cases.named(name)
    spec = dataclasses.replace(case.spec, dropout=dropout)
    x = cases.inputs(case, torch.float32)
    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
    seed = torch.tensor([3]) if dropout else None
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, lse = torch.ops.xfcompile.attention(*leaves, x.operands, x.ints, x.floats, prepare(spec), seed=seed)
    known = {y.untyped_storage().data_ptr() for y in (*leaves, *x.operands, out, lse)}
    known |= {seed.untyped_storage().data_ptr()} if seed is not None else set()
    assert {y.untyped_storage().data_ptr() for y in kept} == known


class Made(TorchDispatchMode):
    """All memory that results of PyTorch's operations lie in, by where it is, and its size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.set_, torch.ops.aten.copy_):
            return out  # Triton's interpreter gives kernels copies of their arguments
        made = [x.untyped_storage() for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.memory |= {(x.data_ptr(), x.nbytes()) for x in made}
        return out


def largest(name: str, length: int) -> int:
    """Bytes of the largest memory that kernels and launchers of a step make, but for what is as large as an operand."""
    case = cases.named(name)
    sizes = cases.Sizes(batch=2, heads=2, kv_heads=1, lq=length, lk=length, dq=8, dv=8)
    x = cases.inputs(case, torch.float32, sizes=sizes)
    needs = Needs(True, True, True, tuple(n for n, y in enumerate(x.operands) if y.is_floating_point()))
    dout = torch.randn(x.q.shape)
    with torch.no_grad(), Made() as made:
        key = prepare(case.spec)
        out, lse = launch.run(x.q, x.k, x.v, x.operands, x.ints, x.floats, key)
        *_, gradients = launch_backward.run(dout, x.q, x.k, x.v, out, lse, x.operands, x.ints, x.floats, key, needs)
    own = {(y.data_ptr(), y.untyped_storage().nbytes()) for y in (*x.operands, *gradients)}
    return max(size for _, size in made.memory - own if size not in [size for _, size in own])


SLOW = ("soft_cap_causal", "documents", "bias_bj", "bias_hij", "alibi")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in ("causal", "padding_mean", "some_rows_leak", "bias_ij", "t5", "sink", *SLOW)
    ],
)
def test_memory_of_kernels_grows_with_lengths_not_with_scores(name: str, interpreter: None) -> None:
    """A bias that two batches or heads share has a gradient of its own size, which is not made for each of them; one
    that depends on distances has one for each distance, in tiles along diagonals."""
    short, long = 64, 192
    assert largest(name, long) < 4 * largest(name, short), "scores would take nine times as much"
