"""Bias, activation and dropout as a family: how a site is run, and the call that is written into the graph."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from xfcompile.activation import KEEP, X
from xfcompile.emit import Emitter
from xfcompile.family import Candidate, Family, Route, Setting, Words
from xfcompile.kernels.gemm import tiles
from xfcompile.kernels.philox import fine_enough
from xfcompile.layout import with_layout
from xfcompile.meaning import Kernel, PointwiseMeaning, Tensor, called, dtype_name, tensor_of
from xfcompile.measured import CPU, GFX942, SM_80, SM_90, SM_100, Fact, Measured, hardware_of
from xfcompile.patterns import bias_act_dropout as pattern
from xfcompile.read import Reading
from xfcompile.site import BiasActDropoutSite, Miss, Product
from xfcompile.values import Value

ROUTES = ("triton", "epilogue", "inductor")
"""triton: one kernel that reads x once and writes the result once; a product before it is torch's own. epilogue: one
kernel for the product and all that follows."""


@dataclass(frozen=True)
class Usual:
    """What usually runs a class of sites on a GPU, if there are `rows` or more (or if nobody knows how many)."""

    route: str
    rows: int = 0


_MEASURED = Measured(
    "python -m xfcompile bench bias-act-dropout",
    "2026-11-25",
    "H200, torch 2.11, triton 3.6",
    "examples/results/bias_act_dropout_h200.json",
)

_BLOCKS = Measured(
    "python -m xfcompile bench bias-act-dropout",
    "2026-11-29",
    "H200, torch 2.11, triton 3.6",
    "examples/benchmarks/bias_act_dropout_h200.json",
)

_KERNELS = Measured(
    "examples/bench_kernels.py", "2026-11-28", "H200, torch 2.11, triton 3.6", "examples/results/kernels_h200.json"
)

_HOPPER: dict[tuple[str, bool], Fact[Usual]] = {
    ("activated, dropped", True): Fact(Usual("triton", 4096), _KERNELS),
    ("activated, dropped", False): Fact(Usual("inductor"), _MEASURED),
    ("activated", True): Fact(Usual("inductor"), _MEASURED),
    ("activated", False): Fact(Usual("epilogue", 4096), tiles.MEASURED),
    ("added, dropped", True): Fact(Usual("triton", 16384), _BLOCKS),
    ("added, dropped", False): Fact(Usual("inductor"), _MEASURED),
    ("added", True): Fact(Usual("inductor"), _MEASURED),
    ("added", False): Fact(Usual("inductor"), _MEASURED),
    ("no product", True): Fact(Usual("inductor"), _MEASURED),
    ("no product", False): Fact(Usual("inductor"), _MEASURED),
}

USUAL: dict[tuple[str, str, bool], Fact[Usual]] = {
    **{(SM_90, *place): fact for place, fact in _HOPPER.items()},
    **{(kind, *place): Fact(Usual("inductor")) for kind in (SM_80, SM_100, GFX942, CPU) for place in _HOPPER},
}
"""By hardware, `shape_class` and whether a gradient is needed. An opaque call keeps Inductor from fusing what stands
beside it: another route has its place here only where a whole block is faster with it
(`python -m xfcompile bench bias-act-dropout`)."""


def shape_class(site: BiasActDropoutSite) -> str:
    """activated: a linear with an activation. added: without one, with a residual or not. dropped: with dropout."""
    if site.product is None:
        return "no product"
    activated = X in sympy.diff(site.formula, X).free_symbols
    return ("activated" if activated else "added") + (", dropped" if site.dropout else "")


@dataclass(frozen=True, kw_only=True)
class BiasActDropoutCandidate(Candidate):
    """A site at a node. training: whether its result needs a gradient. vectors, tensors: the site's, in the program's
    names."""

    site: BiasActDropoutSite
    training: bool = False
    vectors: tuple[Tensor, ...] = ()
    tensors: tuple[Tensor, ...] = ()


def _at_node(reading: Reading, site: BiasActDropoutSite, node: fx.Node) -> BiasActDropoutCandidate:
    emitter = Emitter(reading, node, {})
    site = _readable(emitter, site)
    for value in _read(emitter, site, "epilogue" if site.product is not None else "triton"):
        underlying(emitter, value)
    return BiasActDropoutCandidate(
        site=site,
        node=node,
        operands=(),
        drawn=site.drawn,
        vectors=tuple(tensor_of(reading, v) for v in site.vectors),
        tensors=tuple(tensor_of(reading, v) for v, _ in site.tensors),
    )


def _readable(emitter: Emitter, site: BiasActDropoutSite) -> BiasActDropoutSite:
    """The site, or where no node has what its product is made from (that of a larger call), one of its result."""
    if site.product is None:
        return site
    try:
        for value in (site.product.x, site.product.weight, *(() if site.bias is None else (site.bias,))):
            underlying(emitter, value)
    except Miss:
        views = [site.interior[0]]
        views += [v for v in site.interior if v.op == "reshape" and v["self"] in views]
        bias = site.bias if _without_bias(views[0]) else None
        for x in reversed(views):
            if emitter.holder(x) is not None:
                return replace(site, product=None, x=x, bias=bias, interior=pattern.after(x, site.interior))
        raise
    return site


def _without_bias(start: Value) -> bool:
    """Whether the value at which a site starts is the product alone: its bias is then added later."""
    return start.op != "add" and (start.op != "linear" or start["bias"] is None)


def _read(emitter: Emitter, site: BiasActDropoutSite, route: str) -> tuple[Value, ...]:
    """The values that a route reads."""
    source = _source(emitter, site) if route == "triton" else None
    if source is not None:
        first: tuple[Value, ...] = (source,)
    else:
        assert site.product is not None
        first = (site.product.x, site.product.weight)
    bias = () if site.bias is None else (site.bias,)
    return (*first, *bias, *site.vectors, *(r for r, _ in site.tensors))


def _source(emitter: Emitter, site: BiasActDropoutSite) -> Value | None:
    """x without its bias, where the program has that, and still has it at the emitter's place."""
    if site.product is None:
        return site.x
    start = site.interior[0]
    return start if _without_bias(start) and emitter.holder(start) is not None else None


def _plan(reading: Reading, candidate: BiasActDropoutCandidate, setting: Setting) -> BiasActDropoutCandidate:
    route = _route(candidate.site, setting)
    if route.name == "inductor":
        return replace(candidate, route=route)
    emitter = Emitter(reading, candidate.node, {})
    try:
        operands = tuple(underlying(emitter, v) for v in _read(emitter, candidate.site, route.name))
    except Miss as miss:
        return replace(candidate, route=Route("inductor", miss.reason))
    costly = tuple(v for v in candidate.site.interior if v not in operands)
    return replace(candidate, route=route, operands=operands, costly=costly, training=setting.training)


def _route(site: BiasActDropoutSite, setting: Setting) -> Route:
    wanted = setting.routes.get(site.family)
    if wanted == "inductor":
        return Route("inductor", "asked for")
    reason = setting.why_no_backward or _why_not(site, wanted)
    if reason is not None:
        return Route("inductor", reason)
    if wanted is not None:
        return Route(wanted, "asked for")
    place = (hardware_of(site.root.meta.device), shape_class(site), setting.training)
    usual = USUAL.get(place, Fact(Usual("inductor"))).value
    rows = sympy.prod([sympy.sympify(n) for n in site.root.shape[:-1]])
    if usual.route == "inductor":
        return Route("inductor", "not measured to be faster than what Inductor makes of it")
    if rows.is_Integer and rows < usual.rows:
        return Route("inductor", f"fewer than {usual.rows} rows, for which Inductor is faster")
    reason = _why_no_epilogue(site, rows) if usual.route == "epilogue" else _why_not_after(site, rows)
    if reason is not None:
        return Route("inductor", f"left to Inductor: {reason}")
    return Route(usual.route)


def _why_not_after(site: BiasActDropoutSite, rows: sympy.Expr) -> str | None:
    """Why our kernel after a product was not measured to be faster for such a site; None if it was."""
    if not rows.is_Integer:
        return "sizes that are not known at compile time"
    if site.features < tiles.SHORTEST:
        return f"not measured with fewer than {tiles.SHORTEST} features"
    added = shape_class(site) == "added, dropped"
    if site.tensors and not added:
        return "Inductor computes what is added together with what follows"
    if added and len(site.tensors) != 1:
        return "not measured but with one residual"
    if {site.dtype, site.root.dtype} not in ({torch.float16}, {torch.bfloat16}):
        return "not measured with numbers of other than 16 bits"
    return None


def _why_no_epilogue(site: BiasActDropoutSite, rows: sympy.Expr) -> str | None:
    """Why the product of matrices for Hopper, which is what was measured, does not compute a site; None if it does, as
    far as is known at compile time."""
    from xfcompile.kernels.bias_act_dropout import text_of
    from xfcompile.kernels.bias_act_dropout.launch_hopper import unavailable

    reason = _why_not_after(site, rows)
    if reason is not None:
        return reason
    assert site.product is not None
    inner = sympy.sympify(site.product.x.shape[-1])
    if not inner.is_Integer:
        return "sizes that are not known at compile time"
    if inner < tiles.SHORTEST or site.features % 8 or inner % 8:
        return f"not measured with fewer than {tiles.SHORTEST} features, or with no multiple of 8"
    if site.product.transposed:
        return "a weight that is transposed"
    return unavailable(text_of(site.formula), len(site.vectors), 0)


def _why_not(site: BiasActDropoutSite, wanted: str | None) -> str | None:
    device = site.root.meta.device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernel runs on CPUs only interpreted (TRITON_INTERPRET=1)"
    if site.dropout and torch._inductor.config.fallback_random:
        return "eager's own random numbers are asked for (fallback_random)"
    if not fine_enough(site.dropout):
        return f"a dropout of {site.dropout:g} takes more than the 16 bits that our random numbers have"
    if wanted == "epilogue" and site.product is None:
        return "no linear makes what is activated"
    try:
        from xfcompile.kernels.bias_act_dropout import supports
    except ImportError as error:
        return f"Triton is not installed ({error})"
    operands = (*(r for r, _ in site.tensors), *site.vectors, *(() if site.bias is None else (site.bias,)))
    return supports(device, [site.dtype, site.root.dtype, *(v.dtype for v in operands)])


# -- the call -----------------------------------------------------------------------------------------------------


def underlying(emitter: Emitter, value: Value) -> Value:
    """The operand itself, or what it is a cast or another view of, if no node has it as it is: autocast's casts."""
    while emitter.holder(value) is None and value.op in ("to", "reshape"):
        value = value["self"]
    emitter.held(value)
    return value


def held(emitter: Emitter, value: Value) -> fx.Node:
    """A node with an operand, made of what is `underlying` it."""
    node = emitter.holder(value)
    if node is not None:
        return node
    if value.op == "to":
        return emitter.call("to", held(emitter, value["self"]), value.dtype)
    if value.op == "reshape":
        return emitter.call("reshape", held(emitter, value["self"]), _sizes(emitter, value.shape))
    return emitter.held(value)


def _sizes(emitter: Emitter, shape: tuple[Any, ...]) -> list[Any]:
    return [emitter.size(n) for n in shape]


def _replace(emitter: Emitter, candidate: BiasActDropoutCandidate) -> fx.Node:
    from xfcompile.kernels.bias_act_dropout import saves, source_of_kernel, text_of

    site = candidate.site
    bias = None if site.bias is None else _vector(emitter, site, site.bias)
    vectors = [_vector(emitter, site, v) for v in site.vectors]
    tensors = [_tensor(emitter, site, r, shape) for r, shape in site.tensors]
    drops = KEEP in site.formula.free_symbols
    seed, stream = emitter.seed(site.root.meta.device) if drops else (None, 0)
    formula = text_of(site.formula)
    source_of_kernel(formula, len(vectors), len(tensors), site.dropout)  # what cannot be made is not called
    call = (bias, vectors, tensors, seed, stream, formula, site.dropout, site.root.dtype)
    if candidate.route.name == "epilogue":
        assert site.product is not None
        x = _shaped(emitter, _factor(emitter, site.product.x, site.product), site.product.x.shape, site)
        weight = _factor(emitter, site.product.weight, site.product)
        if site.product.transposed:
            weight = emitter.call("t", weight)
        save = candidate.training and saves(formula, len(vectors), len(tensors), bool(vectors))
        made = emitter.call(torch.ops.xfcompile.linear_act_dropout.default, x, weight, *call, save)
        new = emitter.call(operator.getitem, made, 0)
    else:
        source = _source(emitter, site)
        if source is not None:
            x, shape = held(emitter, source), source.shape
        else:
            x, shape = _product(emitter, site, bias), site.interior[0].shape
        x, summed = _shaped(emitter, x, shape, site), source is None and bias is not None
        new = emitter.call(torch.ops.xfcompile.bias_act_dropout.default, x, *call, summed)
    return with_layout(emitter, candidate.node, new)


def _factor(emitter: Emitter, value: Value, product: Product) -> fx.Node:
    """x or the weight, as the product multiplies it: autocast casts what a product of torch's own is given."""
    node = held(emitter, value)
    return node if value.dtype == product.dtype else emitter.call("to", node, product.dtype)


def _product(emitter: Emitter, site: BiasActDropoutSite, bias: fx.Node | None) -> fx.Node:
    """The product with its bias, whose gradient is the kernel's to find."""
    assert site.product is not None
    x, weight = (_factor(emitter, v, site.product) for v in (site.product.x, site.product.weight))
    if site.product.transposed:
        weight = emitter.call("t", weight)
    if bias is not None:
        assert site.bias is not None
        bias = emitter.call("detach", bias)
        bias = bias if site.bias.dtype == site.product.dtype else emitter.call("to", bias, site.product.dtype)
    return emitter.call(F.linear, x, weight, bias)


def _shaped(emitter: Emitter, x: fx.Node, shape: tuple[Any, ...], site: BiasActDropoutSite) -> fx.Node:
    """x, or the input of the product, with the result's leading dimensions."""
    if shape[:-1] == site.root.shape[:-1]:
        return x
    return emitter.call("reshape", x, [*_sizes(emitter, site.root.shape[:-1]), emitter.size(shape[-1])])


def _vector(emitter: Emitter, site: BiasActDropoutSite, value: Value) -> fx.Node:
    x = held(emitter, value)
    if value.shape == (site.features,):
        return x
    one = value.ndim == 0 or value.shape[-1] == 1
    x = emitter.call("reshape", x, [1 if one else site.features])
    return emitter.call("expand", x, [site.features]) if one else x


def _tensor(emitter: Emitter, site: BiasActDropoutSite, value: Value, shape: tuple[Any, ...]) -> fx.Node:
    x = held(emitter, value)
    if value.shape != shape:
        x = emitter.call("expand", x, _sizes(emitter, shape))
    return x if shape == site.root.shape else emitter.call("reshape", x, _sizes(emitter, site.root.shape))


def _words(candidate: BiasActDropoutCandidate) -> Words:
    formula = candidate.site.formula
    short = formula.xreplace({f: sympy.Float(f, 6) for f in formula.atoms(sympy.Float)})
    text = str(short)
    if candidate.site.dropout:
        text += f", dropout {candidate.site.dropout:g}"
    return Words(expression=text, meaning=_meaning(candidate))


def _meaning(candidate: BiasActDropoutCandidate) -> PointwiseMeaning:
    site = candidate.site
    return PointwiseMeaning(
        formula=site.formula,
        product=site.product is not None,
        bias=site.bias is not None,
        shape=site.root.shape,
        dropout=site.dropout,
        dtype=dtype_name(site.root.dtype),
        vectors=candidate.vectors,
        tensors=candidate.tensors,
    )


def _kernels(nodes: Sequence[fx.Node]) -> tuple[Kernel, ...]:
    call = called(nodes, "xfcompile::bias_act_dropout", "xfcompile::linear_act_dropout")
    if call is None:
        return ()
    from xfcompile.kernels.bias_act_dropout import source_of_kernel

    text = source_of_kernel(call["formula"], len(call["vectors"]), len(call["tensors"]), call["p"])
    return (Kernel("bias, activation and dropout, forward and backward", text),)


BIAS_ACT_DROPOUT: Family[BiasActDropoutSite, BiasActDropoutCandidate] = Family(
    name=pattern.FAMILY,
    routes=ROUTES,
    anchors=pattern.anchors,
    match=pattern.match,
    at_node=_at_node,
    plan=_plan,
    replace=_replace,
    words=_words,
    costly="what is activated or dropped out",
    kernels=_kernels,
)
