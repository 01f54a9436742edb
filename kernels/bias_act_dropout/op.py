"""The operators `xfcompile::bias_act_dropout` and `xfcompile::linear_act_dropout`, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xfcompile.activation import X
from xfcompile.kernels.attention import fit
from xfcompile.kernels.attention.tiles import interpreting, runs
from xfcompile.kernels.bias_act_dropout import launch, launch_backward, launch_linear, reference
from xfcompile.kernels.bias_act_dropout.formula import parse
from xfcompile.kernels.registration import Site, followed, refused, register

DEFINITION = "it is computed by its definition, in plain PyTorch"

LIBRARY = torch.library.Library("xfcompile", "FRAGMENT")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

# Lists may be None: AOTInductor's packages (torch 2.13) hand that to an operator in place of an empty one.
# formula: of one element, as `formula.text_of` writes it. bias [N] is added to x, vectors are [N], tensors have the
# result's shape; seed: int64, one element, where something is dropped out, with probability p. summed: x has the bias
# already, as a product has it that torch makes; what is wanted of it here is its gradient, which torch's is spared.
LIBRARY.define(
    "bias_act_dropout(Tensor x, Tensor? bias, Tensor[]? vectors, Tensor[]? tensors, Tensor? seed, int stream,"
    " str formula, float p, ScalarType dtype, bool summed) -> Tensor",
    tags=_TAGS,
)
# Of x @ weight.T, weight [N, K]. The second result is that product with its bias, rounded as the program rounds it,
# where `save`, else empty: a backward that needs it then multiplies again.
LIBRARY.define(
    "linear_act_dropout(Tensor x, Tensor weight, Tensor? bias, Tensor[]? vectors, Tensor[]? tensors, Tensor? seed,"
    " int stream, str formula, float p, ScalarType dtype, bool save) -> (Tensor, Tensor)",
    tags=_TAGS,
)
# The gradients of x, of the bias and of the vectors, of those that are needed (in this order), in `dtypes`. bias: none
# where x has it already.
LIBRARY.define(
    "bias_act_dropout_backward(Tensor dout, Tensor? x, Tensor? bias, Tensor[] vectors, Tensor? seed, int stream,"
    " str formula, float p, int tensors, bool[] needed, str[] dtypes) -> Tensor[]",
    tags=_TAGS,
)


def supports(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why the kernels cannot run there; None if they can."""
    reason = next((why for dtype in dtypes if (why := runs(device, dtype)) is not None), None)
    if reason is None and device.type == "cpu" and not interpreting():
        return "on a CPU the kernel runs in Triton's interpreter only (TRITON_INTERPRET=1)"
    return reason


def _check(x: Tensor, n: int, bias: Tensor | None, vectors: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for v in (*vectors, *(() if bias is None else (bias,))):
        if v.ndim != 1 or v.shape[0] != n:
            raise ValueError(f"xfcompile::bias_act_dropout: vectors are [{n}], not {list(v.shape)}")
    for r in tensors:
        if r.shape != (*x.shape[:-1], n):
            raise ValueError(
                f"xfcompile::bias_act_dropout: tensors are {[*x.shape[:-1], n]}, as the result is, not {list(r.shape)}"
            )


def _runs(x: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernel is to run; on a CPU plain PyTorch does else."""
    return _runs_in(x, [t.dtype for t in others])


def _runs_in(x: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    reason = supports(x.device, [x.dtype, *dtypes])
    if reason is not None and x.device.type != "cpu":
        raise NotImplementedError(f"xfcompile::bias_act_dropout: {reason}")
    return reason is None and x.numel() > 0


def _checked(
    x: Tensor,
    n: int,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *weight: Tensor,
) -> bool:
    """Whether the kernels run; raises where what they are given does not go together."""
    _check(x, n, bias, vectors, tensors)
    return _runs_in(x, [*[t.dtype for t in (*weight, *vectors, *tensors)], dtype])


def _forward(
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor] | None,
    tensors: Sequence[Tensor] | None,
    seed: Tensor | None,
    stream: int,
    formula: str,
    p: float,
    dtype: torch.dtype,
    summed: bool,
    site: Site | None = None,
) -> Tensor:
    vectors, tensors = vectors or (), tensors or ()
    if summed:
        _check(x, x.shape[-1], bias, (), ())
        bias = None
    try:
        made = launch.forward(x, bias, vectors, tensors, seed, stream, formula, p, dtype, _checked, site)
        if made is not None:
            return made
    except fit.Unavailable as error:
        fit.give_way(error, formula, DEFINITION)
    out = _forward_fake(x, bias, vectors, tensors, seed, stream, formula, p, dtype, summed)
    wide = torch.promote_types(x.dtype, torch.float32)
    parsed = parse(formula, len(vectors), len(tensors))
    return out.copy_(reference.forward(parsed, x, bias, vectors, tensors, seed, stream, p, wide))


def _forward_fake(
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor] | None,
    tensors: Sequence[Tensor] | None,
    seed: Tensor | None,
    stream: int,
    formula: str,
    p: float,
    dtype: torch.dtype,
    summed: bool,
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor] | None,
    tensors: Sequence[Tensor] | None,
    seed: Tensor | None,
    stream: int,
    formula: str,
    p: float,
    dtype: torch.dtype,
    save: bool,
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    vectors, tensors = vectors or (), tensors or ()
    try:
        about = (seed, stream, formula, p, dtype, save, _checked, site)
        made = launch_linear.linear(x, weight, bias, vectors, tensors, *about)
        if made is not None:
            return made
    except fit.Unavailable as error:
        fit.give_way(error, formula, DEFINITION)
    out, pre = _linear_fake(x, weight, bias, vectors, tensors, seed, stream, formula, p, dtype, save)
    wide = torch.promote_types(x.dtype, torch.float32)
    product = launch_linear.biased_product(x.to(wide), weight.to(wide), bias)
    if save:
        pre.copy_(product)
    parsed = parse(formula, len(vectors), len(tensors))
    return out.copy_(reference.forward(parsed, product, None, vectors, tensors, seed, stream, p, wide)), pre


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor] | None,
    tensors: Sequence[Tensor] | None,
    seed: Tensor | None,
    stream: int,
    formula: str,
    p: float,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    out = torch.empty(shape, dtype=dtype, device=x.device)
    return out, torch.empty(shape if save else (0,), dtype=x.dtype, device=x.device)


def _backward(
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    formula: str,
    p: float,
    tensors: int,
    needed: Sequence[bool],
    dtypes: Sequence[str],
) -> list[Tensor]:
    of_x, *others = of_all = [getattr(torch, x) for x in dtypes]
    call = (dout, x, bias, vectors, seed, stream, formula, p)
    found: launch_backward.Gradients | None = None
    try:
        found = launch_backward.backward(*call, tensors, needed, of_all, _runs)
    except fit.Unavailable as error:
        fit.give_way(error, formula, "its gradients are computed by their definition, in plain PyTorch")
    if found is None:
        wide = torch.promote_types(dout.dtype if x is None else x.dtype, torch.float32)
        parsed = parse(formula, len(vectors), tensors)
        gradient, dv = reference.gradients(parsed, dout, x, bias, vectors, seed, stream, p, wide)
        dx = torch.empty(dout.shape, dtype=of_x, device=dout.device).copy_(gradient)
        found = dx, reference.total(gradient), [*dv]
    of_rows, *sums = found[0], found[1], *found[2]
    made = [x.to(dtype) for x, dtype, yes in zip(sums, others, needed[1:], strict=True) if yes and x is not None]
    return [of_rows, *made] if needed[0] and of_rows is not None else made


def _backward_fake(
    dout: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    seed: Tensor | None,
    stream: int,
    formula: str,
    p: float,
    tensors: int,
    needed: Sequence[bool],
    dtypes: Sequence[str],
) -> list[Tensor]:
    shapes = [dout.shape, *([dout.shape[-1:]] * (len(needed) - 1))]
    return [
        torch.empty(shape, dtype=getattr(torch, dtype), device=dout.device)
        for shape, dtype, yes in zip(shapes, dtypes, needed, strict=True)
        if yes
    ]


# -- gradients ----------------------------------------------------------------------------------------------------


def saves(formula: str, vectors: int, tensors: int, of_vectors: bool) -> bool:
    """Whether the gradients, those of vectors among them or not, are functions of x."""
    return X in parse(formula, vectors, tensors).reads(of_vectors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, vectors, tensors, seed, *call, summed = inputs
    ctx.listed, vectors, tensors = (vectors is not None, tensors is not None), vectors or (), tensors or ()
    needed = tuple(ctx.needs_input_grad[: 2 + len(vectors)])  # flat here: lists are not lists
    _keep(ctx, x, bias, vectors, tensors, seed, call, needed, x.dtype, summed)
    ctx.save_for_backward(*ctx.pointwise)
    del ctx.pointwise


def _keep(
    ctx: Any,
    x: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    tensors: Sequence[Tensor],
    seed: Tensor | None,
    call: Sequence[Any],
    needed: tuple[bool, ...],
    dtype: torch.dtype,
    summed: bool,
) -> None:
    """What the backward of the pointwise part needs, and nothing else: tensors as `ctx.pointwise`. summed: x has its
    bias."""
    stream, formula, p = call[:3]
    used = any(needed) and saves(formula, len(vectors), len(tensors), any(needed[2:]))
    ctx.call = (stream, formula, p, len(tensors))
    ctx.needed = needed
    # By their names: torch 2.11 makes numbers of dtypes that are in a list.
    dtypes = [dtype, dtype if bias is None else bias.dtype, *(v.dtype for v in vectors)]
    ctx.dtypes = [str(x).removeprefix("torch.") for x in dtypes]
    coefficients = parse(formula, len(vectors), len(tensors)).coefficients
    ctx.added = [(r.dtype, c) for r, c in zip(tensors, coefficients, strict=True)]
    any_needed = any(needed)
    ctx.pointwise = [
        x if used else None,
        bias if used and not summed else None,
        seed if any_needed else None,
        *(vectors if any_needed else ()),
    ]


def _pointwise_gradients(ctx: Any, dout: Tensor, saved: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    """Of x, of the bias and of the vectors; None where none is needed."""
    x, bias, seed, *vectors = saved
    if not any(ctx.needed):
        return None, None, [None] * (len(ctx.needed) - 2)
    stream, formula, p, tensors = ctx.call
    found = iter(
        torch.ops.xfcompile.bias_act_dropout_backward(
            dout, x, bias, vectors, seed, stream, formula, p, tensors, list(ctx.needed), ctx.dtypes
        )
    )
    dx, dbias, *dv = (next(found) if needed else None for needed in ctx.needed)
    return dx, dbias, dv


def _added_gradients(ctx: Any, dout: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Of tensors, which are added times a number."""
    return [
        (dout if c == 1.0 else dout * c).to(dtype) if needed else None
        for (dtype, c), needed in zip(ctx.added, needs, strict=True)
    ]


def _listed(ctx: Any, dv: list[Any], dout: Tensor, needs: Any) -> tuple[list[Any] | None, list[Any] | None]:
    """The gradients of vectors and of tensors, as lists where these were."""
    vectors, tensors = ctx.listed
    return dv if vectors else None, _added_gradients(ctx, dout, needs) if tensors else None


def _gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    dx, dbias, dv = _pointwise_gradients(ctx, dout, ctx.saved_tensors)
    lists = _listed(ctx, dv, dout, ctx.needs_input_grad[3])
    return dx, dbias, *lists, None, None, None, None, None, None


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, vectors, tensors, seed, *call = inputs
    ctx.listed, vectors, tensors = (vectors is not None, tensors is not None), vectors or (), tensors or ()
    needs_x, needs_weight, *needs = ctx.needs_input_grad[: 3 + len(vectors)]
    _, pre = output
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)
    needed = (needs_x or needs_weight, *needs)
    _keep(ctx, pre, bias, vectors, tensors, seed, call, needed, x.dtype, True)
    # Not of an exported program: nobody knows whether its gradients will be wanted.
    ctx.again = ctx.pointwise[0] is not None and not call[-1]
    if ctx.again:
        ctx.pointwise[0] = None
    x_kept, weight_kept = (needs or ctx.again for needs in (needs_weight, needs_x))
    kept = (x if x_kept else None, weight if weight_kept else None, bias)
    ctx.save_for_backward(*kept, *ctx.pointwise)
    del ctx.pointwise


def _linear_gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 11
    x, weight, bias, *saved = ctx.saved_tensors
    if ctx.again:
        saved[0] = launch_linear.biased_product(x, weight, bias)
    elif saved[0] is not None and torch.is_grad_enabled():
        # A second derivative by what was not kept would be none, and no error.
        if any(t is None for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed):
            _refused[0](ctx)
    dpre, dbias, dv = _pointwise_gradients(ctx, followed(dout, x, weight, bias), saved)
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx = dpre @ weight if needs_x else None
    dweight = dpre.flatten(0, -2).t() @ x.flatten(0, -2) if needs_weight else None
    lists = _listed(ctx, dv, dout, ctx.needs_input_grad[4])
    return dx, dweight, dbias, *lists, None, None, None, None, None, None


_refused = refused("bias_act_dropout", "bias-act-dropout")
register(LIBRARY, "bias_act_dropout", _forward, _forward, _forward_fake, (_gradients, _setup))
register(LIBRARY, "linear_act_dropout", _linear, _linear, _linear_fake, (_linear_gradients, _setup_linear))
register(LIBRARY, "bias_act_dropout_backward", _backward, _backward, _backward_fake, _refused)

bias_act_dropout = torch.ops.xfcompile.bias_act_dropout
linear_act_dropout = torch.ops.xfcompile.linear_act_dropout
