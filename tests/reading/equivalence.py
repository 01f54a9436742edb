"""Compiles a program with the rewrite and without Inductor, and compares it with eager by their errors against fp64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xfcompile.options import Options
from xfcompile.report import Report, SiteReport
from xfcompile.rewrite import rewrite_graph

LAYERS = frozenset({"attention", "gated_mlp"})
ALL = frozenset({"attention", "gated_mlp", "bias-act-dropout"})

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class Outcome:
    """What came of a program: its sites, the rewritten graphs, and the ATen graphs that ran, of both directions."""

    sites: list[SiteReport] = field(default_factory=list)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    programs: list[fx.GraphModule] = field(default_factory=list)
    backwards: list[fx.GraphModule] = field(default_factory=list)

    @property
    def matched(self) -> list[SiteReport]:
        return [s for s in self.sites if s.matched]

    @property
    def reasons(self) -> str:
        return "; ".join(str(s.reason) for s in self.sites if not s.matched)

    def squares(self, rows: int, columns: int) -> list[str]:
        """The nodes of what ran whose result is a [.., rows, columns] tensor: masks and scores in memory."""
        found = []
        for gm in (*self.programs, *self.backwards):
            for node in gm.graph.nodes:
                value = node.meta.get("val")
                if node.op == "call_function" and isinstance(value, torch.Tensor):
                    if tuple(value.shape[-2:]) == (rows, columns):
                        found.append(f"{node.target}: {value.dtype} {tuple(value.shape)}")
        return found


def rewriting(
    outcome: Outcome,
    routes: dict[str, str] | None = None,
    rewrite: bool = True,
    family: str | frozenset[str] | None = None,
    aot: bool = True,
) -> Callable[..., Any]:
    """A backend for `torch.compile`: the rewrite, for one family or for those whose sites are whole layers; then
    AOTAutograd, then eager ATen. aot: False runs the rewritten graph as it is."""
    families = LAYERS if family is None else family if isinstance(family, frozenset) else frozenset([family])

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        outcome.programs.append(gm)
        return make_boxed_func(gm.forward)

    def keep_backward(gm: fx.GraphModule, _: Any) -> Any:
        outcome.backwards.append(gm)
        return make_boxed_func(gm.forward)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        report = Report()
        if rewrite:
            rewrite_graph(gm, example_inputs, Options(families, routes or {}, strict=True), report)
        outcome.sites += report.sites
        if not aot:
            return gm.forward
        outcome.graphs.append(copy.deepcopy(gm))
        run = aot_autograd(
            fw_compiler=keep,
            bw_compiler=keep_backward,
            partition_fn=min_cut_rematerialization_partition,
            keep_inference_input_mutations=True,
        )
        try:
            return run(gm, example_inputs)
        except Exception:  # Dynamo traces anew, with numbers in place of symbols
            del outcome.sites[len(outcome.sites) - len(report.sites) :], outcome.graphs[-1]
            raise

    return backend


class Double(TorchDispatchMode):
    """Every real tensor is fp64, whatever dtype the program names."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(x: Any) -> Any:
            return torch.float64 if isinstance(x, torch.dtype) and x in REAL else x

        args, kwargs = pytree.tree_map(widen, (args, kwargs or {}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Double():
            yield
    finally:
        torch.set_default_dtype(before)


Shown = tuple[list[torch.Tensor], list[torch.Tensor]]


def run(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    grad: bool,
    double: bool,
    called: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Shown:
    """Everything that running a program shows: outputs and inputs as it left them; and gradients."""

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        # Strides are kept: a program may view its inputs, and layouts are part of what is compared.
        y = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            if 0 not in x.stride()
            else x.detach().clone()
        )
        y.copy_(x.detach())
        y = y.double() if double and x.dtype in REAL else y
        return y.requires_grad_(grad and x.dtype in REAL and x.requires_grad)

    mine = [own(x) for x in inputs]
    leaves = [x for x in mine if isinstance(x, torch.Tensor) and x.requires_grad]
    module = fn if isinstance(fn, torch.nn.Module) else None
    if module is not None and double:
        fn = module = copy.deepcopy(module).double()
    if module is not None and grad:
        leaves += list(module.parameters())
        module.zero_grad()
    torch.manual_seed(seed)
    with in_double() if double else contextlib.nullcontext():
        out = (fn if called is None else called)(*mine)
        shown = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        real = [x for x in shown if x.requires_grad]
        if grad and real:
            weights = [torch.linspace(0.5, 1.5, x.numel()).reshape(x.shape).to(x.dtype) for x in real]
            torch.autograd.backward(real, weights)
    shown = [x.detach() for x in shown]
    shown += [x.detach() for x in mine if isinstance(x, torch.Tensor)]
    return shown, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def assert_equivalent(
    compiled: list[torch.Tensor],
    eager: list[torch.Tensor],
    exact: list[torch.Tensor],
    gradients: bool = False,
    computed: torch.dtype | None = None,
) -> None:
    """NaN and infinity where eager has them, and elsewhere no more error than eager: twice its own plus 4 ulp of the
    result's scale, which is what two correct orders of summation may differ by.

    gradients: where eager's is NaN (it multiplies the NaN of a row without keys by 0), ours may be a number; and the
    scale is that of all of them, for one that cancels to 0 is a difference of numbers as large as the others. Fused
    kernels don't store weights but compute them again as exp(s - lse), which errs by the rounding of s and of lse: of
    scores up to 16, 16 ulp.

    computed: the least exact dtype that the program computes in, where that is not its results': under autocast.
    """
    kind = "gradient" if gradients else "result"
    assert len(compiled) == len(eager) == len(exact)
    for n, (ours, theirs, truth) in enumerate(zip(compiled, eager, exact, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (n, ours.shape, theirs.shape, ours.dtype)
        if not gradients:
            assert lie_alike(ours, theirs), f"result {n} lies as {ours.stride()}, eager's as {theirs.stride()}"
        if theirs.dtype not in REAL:
            assert torch.equal(ours, theirs), f"{kind} {n} differs"
            continue
        same = torch.equal(ours.isnan(), theirs.isnan())
        fewer = gradients and not (ours.isnan() & ~theirs.isnan()).any()
        assert same or fewer, f"{kind} {n}: NaN in other places than eager"
        infinite = theirs.isinf()
        assert torch.equal(ours[infinite], theirs[infinite]), f"{kind} {n}: infinities differ"
        assert not ours[~infinite].isinf().any(), f"{kind} {n}: infinite where eager is not"
        finite = theirs.isfinite() & truth.isfinite()
        if not finite.any():
            continue
        a, b, c = ours[finite].double(), theirs[finite].double(), truth[finite].double()
        mine, eagers = (a - c).abs().max().item(), (b - c).abs().max().item()
        scale = max((_size(x) for x in exact), default=0.0) if gradients else _size(truth)
        eps = max(torch.finfo(dtype).eps for dtype in (theirs.dtype, computed or theirs.dtype))
        floor = (16 if gradients else 4) * eps * scale
        assert mine <= 2 * eagers + floor, f"{kind} {n}: error {mine:.3g}, eager's own {eagers:.3g}, floor {floor:.3g}"


def lie_alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether views of both are possible in the same shapes; where there is one element, there is no stride."""
    strides = zip(x.stride(), y.stride(), x.shape, strict=True)
    return x.numel() == 0 or all(a == b for a, b, n in strides if n != 1)


def _size(x: torch.Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def check(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: bool = False,
    dynamic: bool | None = False,
    routes: dict[str, str] | None = None,
    rewrite: bool = True,
    family: str | frozenset[str] | None = None,
    aot: bool = True,
    known: tuple[Shown, Shown] | None = None,
    computed: torch.dtype | None = None,
) -> Outcome:
    """Compile, run, compare with eager, and say what was matched. `grad`: compare gradients too.

    rewrite: False compiles the program as it is, which tells our errors from torch's. aot: as of `rewriting`.
    known: what eager gives, and eager in fp64, where that is known. computed: as of `assert_equivalent`.
    """
    torch._dynamo.reset()
    outcome = Outcome()
    backend = rewriting(outcome, routes, rewrite, family, aot)
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=False)
    ours = run(fn, inputs, grad=grad, double=False, called=compiled)
    eager, exact = known or (run(fn, inputs, grad=grad, double=double) for double in (False, True))
    assert_equivalent(ours[0], eager[0], exact[0], computed=computed)
    assert_equivalent(ours[1], eager[1], exact[1], gradients=True, computed=computed)
    return outcome


def tensors(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    """Normal tensors of the given shapes, on the default device."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=generator, device="cpu").to(torch.get_default_device(), dtype) for s in shapes]
    return [x.requires_grad_(grad) for x in made]
