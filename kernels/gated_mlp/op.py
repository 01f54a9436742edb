"""The ops `xfcompile::gated_mlp`, the same with the linear after it, and their backward."""

from __future__ import annotations

from typing import Any, cast, get_args

import torch
from torch import Tensor

from xfcompile.kernels.attention import fit
from xfcompile.kernels.attention.tiles import interpreting, runs
from xfcompile.kernels.gated_mlp import launch, launch_pointwise, reference
from xfcompile.kernels.gated_mlp.operands import Dropout, outputs
from xfcompile.kernels.gated_mlp.programs import program
from xfcompile.kernels.registration import Site, followed, refused, register
from xfcompile.site import Layout

LIBRARY = torch.library.Library("xfcompile", "FRAGMENT")
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

# x [.., M, K] (2 dimensions, or 3 with experts), weight and up_weight [.., N, K], or one weight [.., 2 N, K] by
# `layout`; biases [.., N]. form: "dual", one kernel, or "packed", a product by cuBLAS and a kernel after it. save:
# whether the projections [.., M, 2 N] are returned for the backward, which projects again if they are not. p, seed: of
# dropout.
_INPUTS = "Tensor x, Tensor weight, Tensor? up_weight, Tensor? gate_bias, Tensor? up_bias"
_ABOUT = "str kernel, str layout, str form, bool save, ScalarType dtype, Tensor? seed=None, float p=0."
LIBRARY.define(f"gated_mlp({_INPUTS}, {_ABOUT}) -> (Tensor out, Tensor projections)", tags=TAGS)
LIBRARY.define(
    f"gated_mlp_down({_INPUTS}, Tensor down_weight, Tensor? down_bias, {_ABOUT}) -> (Tensor out, Tensor projections)",
    tags=TAGS,
)
LIBRARY.define(
    "gated_mlp_backward(Tensor dout, Tensor projections, str kernel, str layout, bool product, Tensor? seed=None,"
    " float p=0.) -> (Tensor grad, Tensor product)",
    tags=TAGS,
)


def _error(name: str, what: str) -> ValueError:
    return ValueError(f"xfcompile::{name}: {what}")


def check(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    layout: str,
    form: str,
    seed: Tensor | None,
    p: float,
) -> None:
    """Shapes, dtypes and devices; an error says what was expected and what was found."""
    name = "gated_mlp"
    if layout not in get_args(Layout) or form not in ("dual", "packed"):
        raise _error(name, f"no layout {layout!r}, or no form {form!r}")
    if (layout == "separate") != (up_weight is not None):
        raise _error(name, f"two weights are 'separate', one is not; the layout is {layout!r}")
    if x.ndim not in (2, 3) or weight.ndim != x.ndim:
        raise _error(name, f"x is [M, K] or [E, M, K], and weights alike; found {list(x.shape)}, {list(weight.shape)}")
    if up_weight is not None and up_weight.shape != weight.shape:
        raise _error(name, f"weights of gate and up are alike; found {list(weight.shape)}, {list(up_weight.shape)}")
    if weight.shape[-1] != x.shape[-1] or weight.shape[:-2] != x.shape[:-2]:
        raise _error(name, f"x {list(x.shape)} and weights {list(weight.shape)} do not go together")
    if up_weight is None and weight.shape[-2] % 2:
        raise _error(name, f"a packed weight has an even number of features, not {weight.shape[-2]}")
    features = weight.shape[-2] // (1 if up_weight is not None else 2)
    for bias in (gate_bias, up_bias):
        if bias is not None and bias.shape != (*weight.shape[:-2], features):
            raise _error(name, f"biases are {[*weight.shape[:-2], features]}, not {list(bias.shape)}")
    given = [t for t in (x, weight, up_weight, gate_bias, up_bias) if t is not None]
    if len({(t.dtype, t.device) for t in given}) != 1:
        raise _error(name, f"x, weights and biases have one dtype and one device, not {[t.dtype for t in given]}")
    if p != 0.0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        raise _error(name, "dropout takes a seed, one int64")


def project(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    layout: Layout,
) -> Tensor:
    """Both projections [.., M, 2 N], by PyTorch: one product where there is one weight."""
    if up_weight is not None:
        gate, up = (_product(x, w, b) for w, b in ((weight, gate_bias), (up_weight, up_bias)))
        return reference.joined(gate, up, layout)
    if gate_bias is None and up_bias is None:
        return _product(x, weight, None)
    features = weight.shape[-2] // 2
    biases = [x.new_zeros((*weight.shape[:-2], features)) if b is None else b for b in (gate_bias, up_bias)]
    return _product(x, weight, reference.joined(biases[0], biases[1], layout))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.ndim == 2:
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _gated_mlp(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    kernel: str,
    layout: str,
    form: str,
    save: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
    site: Site | None = None,
) -> tuple[Tensor, Tensor]:
    def checked() -> None:
        check(x, weight, up_weight, gate_bias, up_bias, layout, form, seed, p)
        reason = runs(x.device, x.dtype)
        if reason is not None:
            raise NotImplementedError(f"xfcompile::gated_mlp: {reason}")

    known = cast(Layout, layout)
    on_cpu = x.device.type == "cpu"
    if form == "packed" or on_cpu:
        checked()
    if on_cpu and not interpreting():
        out, saved = outputs(x, weight, up_weight, save, dtype)
        return _by_reference(x, weight, up_weight, gate_bias, up_bias, kernel, known, save, out, saved, seed, p)
    if form == "dual":
        about = (known, save, dtype, seed, p)
        try:
            return launch.forward(kernel, x, weight, up_weight, gate_bias, up_bias, *about, checked, site)
        except fit.Unavailable as error:
            fit.give_way(error, kernel, "it is computed by PyTorch's products and a kernel after them")
    out, saved = outputs(x, weight, up_weight, False, dtype)
    both = project(x, weight, up_weight, gate_bias, up_bias, known)
    try:
        launch_pointwise.product(kernel, both, known, Dropout(seed if p != 0.0 else None, p), out)
    except fit.Unavailable as error:
        fit.give_way(error, kernel, "it is computed by its definition, in plain PyTorch")
        out, saved = outputs(x, weight, up_weight, save, dtype)
        return _by_reference(x, weight, up_weight, gate_bias, up_bias, kernel, known, save, out, saved, seed, p)
    return out, both if save else saved


def _by_reference(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    kernel: str,
    layout: Layout,
    save: bool,
    out: Tensor,
    saved: Tensor,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    """The definition, for CPUs and where no kernel can be launched: sums in fp32 at least, and projections rounded when
    they are saved."""
    made, gate, up = reference.forward(
        program(kernel).formula,
        x,
        (weight, up_weight),
        (gate_bias, up_bias),
        layout,
        seed,
        p,
        torch.promote_types(x.dtype, torch.float32),
    )
    if save:
        saved.copy_(reference.joined(gate, up, layout))
    return out.copy_(made), saved


def _gated_mlp_fake(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    kernel: str,
    layout: str,
    form: str,
    save: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check(x, weight, up_weight, gate_bias, up_bias, layout, form, seed, p)
    return outputs(x, weight, up_weight, save, dtype)


def _gated_mlp_down(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    kernel: str,
    layout: str,
    form: str,
    save: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    product, saved = _gated_mlp(x, weight, up_weight, gate_bias, up_bias, kernel, layout, form, save, dtype, seed, p)
    return _product(product, down_weight, down_bias), saved


def _gated_mlp_down_fake(
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    kernel: str,
    layout: str,
    form: str,
    save: bool,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check(x, weight, up_weight, gate_bias, up_bias, layout, form, seed, p)
    product, saved = outputs(x, weight, up_weight, save, dtype)
    if x.ndim != 2 or down_weight.ndim != 2 or down_weight.shape[1] != product.shape[1] or down_weight.dtype != dtype:
        found = f"product {list(product.shape)} of {dtype}, weight {list(down_weight.shape)} of {down_weight.dtype}"
        raise _error("gated_mlp_down", f"the second linear does not go with the product: {found}")
    return product.new_empty((x.shape[0], down_weight.shape[0])), saved


def _backward(
    dout: Tensor,
    projections: Tensor,
    kernel: str,
    layout: str,
    product: bool,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_backward(dout, projections)
    known = cast(Layout, layout)
    if projections.device.type != "cpu" or interpreting():
        try:
            return launch_pointwise.backward(kernel, dout, projections, known, seed, p, product)
        except fit.Unavailable as error:
            fit.give_way(error, kernel, "its gradients are computed by their definition, in plain PyTorch")
    grad, made = launch_pointwise.backward_outputs(dout, projections, product)
    dtype = torch.promote_types(projections.dtype, torch.float32)
    gate, up = (t.to(dtype) for t in reference.parts(projections, known))
    d_gate, d_up, value = reference.backward(program(kernel).formula, dout, gate, up, seed, p)
    grad.copy_(reference.joined(d_gate, d_up, known))
    return grad, made.copy_(value) if product else made


def _backward_fake(
    dout: Tensor,
    projections: Tensor,
    kernel: str,
    layout: str,
    product: bool,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check_backward(dout, projections)
    return launch_pointwise.backward_outputs(dout, projections, product)


def _check_backward(dout: Tensor, projections: Tensor) -> None:
    if projections.shape != (*dout.shape[:-1], 2 * dout.shape[-1]) or not projections.is_contiguous():
        found = f"{list(dout.shape)} and {list(projections.shape)}"
        raise _error(
            "gated_mlp_backward", f"dout is [.., M, N] and projections [.., M, 2 N], contiguous; found {found}"
        )


# -- autograd -----------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps x, the projections (or none, and then the biases), and what is no activation: weights and the seed."""
    down = len(inputs) == 14
    x, weight, up_weight, gate_bias, up_bias = inputs[:5]
    ctx.down = down
    ctx.kernel, ctx.layout, _, saved, _, seed, ctx.p = inputs[7 if down else 5 :]
    ctx.save_for_backward(
        x,
        weight,
        up_weight,
        gate_bias,
        up_bias,
        inputs[5] if down else None,
        seed,
        output[1] if saved else None,
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, weight, up_weight, gate_bias, up_bias, down_weight, seed, projections = ctx.saved_tensors
    layout: Layout = ctx.layout
    needed = ctx.needs_input_grad
    none = (None,) * 7
    if dout is None:
        return (None,) * len(needed)
    d_down: tuple[Any, ...] = ()
    remade, inner = ctx.down and needed[5], any(needed[:5])
    if not inner and not remade:
        return (*(None,) * 5, *((None, dout.sum(0) if needed[6] else None) if ctx.down else ()), *none)
    if projections is None:
        projections = project(x, weight, up_weight, gate_bias, up_bias, layout)
    if not ctx.down:
        dproduct = dout
    else:  # of a product that needs no gradient, any will do
        dproduct = torch.mm(dout, down_weight) if inner else reference.parts(projections, layout)[0]
    backward = torch.ops.xfcompile.gated_mlp_backward
    grad, product = backward(
        followed(dproduct, x, weight, up_weight, gate_bias, up_bias),
        projections,
        ctx.kernel,
        layout,
        remade,
        seed,
        ctx.p,
    )
    if ctx.down:
        d_weight = _weight_gradient(dout, product, down_weight) if needed[5] else None
        d_down = (d_weight, dout.sum(0) if needed[6] else None)
    d_gate, d_up = reference.parts(grad, layout)
    d_x = None
    if needed[0] and up_weight is None:
        d_x = grad @ weight
    elif needed[0]:
        add = torch.addmm if x.ndim == 2 else torch.baddbmm
        d_x = add(d_gate @ weight, d_up, up_weight)
    d_weights: tuple[Tensor | None, ...]
    if up_weight is None:
        d_weights = (_weight_gradient(grad, x, weight) if needed[1] else None, None)
    elif needed[1] and needed[2] and x.ndim == 2 and _by_rows(weight) and _by_rows(up_weight):
        # One product for both. Of experts the halves would not lie as their weights do.
        d_weights = reference.parts(grad.mT @ x, layout, -2)
    else:
        d_weights = (
            _weight_gradient(d_gate, x, weight) if needed[1] else None,
            _weight_gradient(d_up, x, up_weight) if needed[2] else None,
        )
    d_biases = [d.sum(-2) if need else None for d, need in ((d_gate, needed[3]), (d_up, needed[4]))]
    return (d_x, *d_weights, *d_biases, *d_down, *none)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """gradᵀ x, laid out as the weight is."""
    return grad.mT @ x if _by_rows(weight) else (x.mT @ grad).mT


def _by_rows(weight: Tensor) -> bool:
    return weight.stride(-2) != 1 or weight.shape[-1] == 1


register(LIBRARY, "gated_mlp", _gated_mlp, _gated_mlp, _gated_mlp_fake, (_gradients, _setup))
register(LIBRARY, "gated_mlp_down", _gated_mlp_down, _gated_mlp_down, _gated_mlp_down_fake, (_gradients, _setup))
register(LIBRARY, "gated_mlp_backward", _backward, _backward, _backward_fake, refused("gated_mlp", "gated_mlp"))

gated_mlp = torch.ops.xfcompile.gated_mlp
gated_mlp_down = torch.ops.xfcompile.gated_mlp_down
gated_mlp_backward = torch.ops.xfcompile.gated_mlp_backward
