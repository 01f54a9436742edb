"""What a report keeps of a site beyond its line in the table: enough to draw it and to write it out.

No tensor and no graph is kept: all is frozen values, numbers, strings and sympy expressions. A report can therefore be
pickled, and shown long after the program is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from xfcompile.example import example_of
from xfcompile.read import Reading
from xfcompile.site import Band
from xfcompile.source import Frame
from xfcompile.values import Value


@dataclass(frozen=True)
class Tensor:
    """A tensor that a formula speaks of. name: in the user's program; None of a result on the way that has none.
    made_of: the inputs and parameters that such a result is computed from, if they are few."""

    name: str | None
    dtype: str
    shape: tuple[Any, ...]
    made_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionMeaning:
    """softmax over j of `score` where `keep`, times v: as in `site.AttentionSite`.

    sizes: of the batch axes. loads: what `Load(n, ..)` speaks of. known: what symbolic sizes were in this run.
    """

    score: sympy.Expr
    keep: sympy.Basic
    dead: str
    alive: bool
    sink: sympy.Expr | None
    band: Band
    dropout: float
    sizes: tuple[sympy.Expr, ...]
    queries: sympy.Expr
    keys: sympy.Expr
    head_dim: sympy.Expr
    value_dim: sympy.Expr
    dtype: str
    loads: tuple[Tensor, ...] = ()
    known: tuple[tuple[sympy.Symbol, int], ...] = ()


@dataclass(frozen=True)
class GatedMeaning:
    """A function of two projections of x [rows, inner] to `features` each: as in `site.GatedMLPSite`.

    biases: whether gate and up have one. down: whether the linear after the product is part of the site.
    """

    formula: sympy.Expr
    layout: str
    rows: sympy.Expr
    inner: sympy.Expr
    features: sympy.Expr
    experts: sympy.Expr | None
    biases: tuple[bool, bool]
    down: bool
    dropout: float
    dtype: str


@dataclass(frozen=True)
class PointwiseMeaning:
    """A function of one element of a linear's result, or of any tensor: as in `site.BiasActDropoutSite`.

    shape: of the result. product, bias: whether x is a product with a weight, and has a bias added. vectors, tensors:
    what `activation.vector(n)` and `activation.tensor(n)` are.
    """

    formula: sympy.Expr
    product: bool
    bias: bool
    shape: tuple[Any, ...]
    dropout: float
    dtype: str
    vectors: tuple[Tensor, ...] = ()
    tensors: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class FormulaMeaning:
    """What families of other packages say: one element of the result, as a formula of any symbols."""

    formula: sympy.Expr


Meaning = AttentionMeaning | GatedMeaning | PointwiseMeaning | FormulaMeaning


@dataclass(frozen=True)
class Kernel:
    """A generated module: what it does, in a few words, and its text."""

    title: str
    text: str


@dataclass(frozen=True)
class About:
    """One site, in full.

    place: the number of the graph, and of the node in it; of a node in an inner graph, that of the call before its own.
    frames: the user's stack, innermost last. call: the nodes put in the site's place, as a program.
    """

    place: tuple[int, ...] = (0,)
    frames: tuple[Frame, ...] = ()
    meaning: Meaning | None = None
    call: str | None = None
    kernels: tuple[Kernel, ...] = ()


# -- from a graph -------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_of(reading: Reading, value: Value) -> Tensor:
    """A value by the name that the user's program has for it, as far as the graph tells."""
    own = _input_name(reading, value)
    if own is not None:
        return Tensor(own, dtype_name(value.dtype), value.shape)
    node = next((node for node, _ in reading.holders.get(value, ())), None)
    name = None if node is None or _is_generic(node) else node.name
    return Tensor(name, dtype_name(value.dtype), value.shape, _origins(reading, value))


def _input_name(reading: Reading, value: Value) -> str | None:
    node = next((node for node, _ in reading.holders.get(value, ()) if node.op in ("placeholder", "get_attr")), None)
    return None if node is None else name_of(node)


def _is_generic(node: fx.Node) -> bool:
    """Whether a node is called after what it does ("add_3"), and not after a variable of the user's."""
    name = getattr(node.target, "__name__", str(node.target)).strip("_")
    return node.name.strip("_").rstrip("0123456789").rstrip("_") == name


MANY = 64
"""Steps back from a tensor after which it is not said any more what it is made of."""


def _origins(reading: Reading, value: Value) -> tuple[str, ...]:
    """The names of the inputs that a value is computed from; none if these are not found soon."""
    found: dict[str, None] = {}
    todo, seen = [value], {value}
    while todo:
        if len(seen) > MANY:
            return ()
        for below in todo.pop().inputs():
            if below in seen:
                continue
            seen.add(below)
            name = _input_name(reading, below)
            if name is None:
                todo.append(below)
            else:
                found[name] = None
    return tuple(found)


_FIRST = ("L_", "l_")
_MEMBERS = ("_modules_", "_parameters_", "_buffers_")


def name_of(node: fx.Node) -> str:
    """An input of a graph by its name in the program: "encoder.block.0.weight" of Dynamo's
    `L_self_modules_encoder_modules_block_modules_0_parameters_weight_`."""
    name = str(node.target)
    if not name.startswith(_FIRST):
        return name
    name = name[2:].removesuffix("_")
    for member in _MEMBERS:
        name = name.replace(member, ".")
    head, dot, rest = name.partition(".")
    if dot:
        return rest
    for packed in ("kwargs_", "args_"):  # of what `explain` calls
        head = (
            head.removeprefix(packed) if not head.removeprefix(packed).isdigit() else f"argument {head[len(packed) :]}"
        )
    return head


def known_sizes(node: fx.Node, formulas: Iterable[Any]) -> tuple[tuple[sympy.Symbol, int], ...]:
    """What the symbols of some formulas were in the run that was traced, as far as that is known."""
    symbols = sorted(set().union(*(sympy.sympify(f).free_symbols for f in formulas)), key=str)
    examples = [example_of(n) for n in (node, *node.all_input_nodes)]
    sizes: list[Any] = [
        n for x in examples if isinstance(x, torch.Tensor) for n in x.shape if isinstance(n, torch.SymInt)
    ]
    env: Any = sizes[0].node.shape_env if sizes else None
    found = getattr(env, "backed_var_to_val", None)
    found = getattr(env, "var_to_val", {}) if found is None else found
    return tuple((x, int(found[x])) for x in symbols if x in found)


def called(nodes: Sequence[fx.Node], *operators: str) -> dict[str, Any] | None:
    """The arguments, by name, of the first call of one of some operators ("xfcompile::attention")."""
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in operators:
            names = [argument.name for argument in node.target._schema.arguments]
            return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return None


def program_of(nodes: Sequence[fx.Node]) -> str | None:
    """The nodes as lines of Python, one a call; None if there is none."""
    return "\n".join(_line(node) for node in nodes) or None


def _line(node: fx.Node) -> str:
    words = [_argument(x) for x in node.args]
    named = [f"{key}={_argument(x)}" for key, x in node.kwargs.items()]
    if node.op == "call_method":
        return f"{node.name} = {words[0]}.{node.target}({', '.join([*words[1:], *named])})"
    name = getattr(node.target, "__name__", str(node.target))
    if isinstance(node.target, torch._ops.OpOverload):
        name = f"torch.ops.{node.target.namespace}.{node.target._schema.name.split('::')[-1]}"
    if name == "getitem" and len(words) == 2:
        return f"{node.name} = {words[0]}[{words[1]}]"
    return f"{node.name} = {name}({', '.join([*words, *named])})"


def _argument(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        inner = ", ".join(_argument(y) for y in x)
        return f"[{inner}]" if isinstance(x, list) else f"({inner},)" if len(x) == 1 else f"({inner})"
    if isinstance(x, fx.Node):
        return x.name
    return repr(x) if isinstance(x, (str, int, float, bool, type(None))) else str(x)
