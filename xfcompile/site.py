"""What a pattern finds: a frozen description of what a subgraph means, or the reason why it is not one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import sympy
import torch

from xfcompile.order import BIASES_FIRST, Order
from xfcompile.values import Value

Dead = Literal["nan", "mean", "zero"]


class Miss(Exception):
    """A candidate that is not matched, and why. `culprits` are whatever the reason speaks of (nodes or values)."""

    def __init__(self, reason: str, *culprits: object) -> None:
        super().__init__(reason)
        self.reason = reason
        self.culprits = culprits


@dataclass(frozen=True)
class Operand:
    """A tensor that the score loads from: what a kernel must know of it before it sees it."""

    dtype: torch.dtype
    ndim: int


@dataclass(frozen=True)
class Band:
    """Closed bounds of the keys that a query may see: `lower(i) <= j < upper(i)` wherever `keep` holds.

    Both are non-decreasing in i and made of `I` and scalars; None is no bound on that side.
    `exact`: the bounds say all that `keep` says.
    """

    lower: sympy.Expr | None = None
    upper: sympy.Expr | None = None
    exact: bool = False


@dataclass(frozen=True)
class ScoreSpec:
    """softmax over j of `score` where `keep`: everything that a kernel needs to know of one attention site.

    score: expression in the vocabulary of `xfcompile.score`, without masking.
    keep: the mask predicate over (b, h, i, j), scalars and loads; `sympy.true` is no mask.
    dead: what a query row that may see no key yields: NaN (-inf fill), the mean of all of v (a finite fill that absorbs
        the scores), or 0 (SDPA with a boolean mask).
    operands: dtype and rank of operand n, for each `Load(n, ...)`.
    scalars: the free symbols that are neither `S` nor a position; integers (symbolic sizes) or real numbers.
    sink: an extra logit, a function of (b, h, i), that takes part in the softmax but has no value (attention sinks).
    band: closed bounds on j, derived from `keep`.
    far: whether a score may be finite and so far from 0 that its product with log2(e) is not: finfo.min, added by a
        mask that is data. Kernels for halves then clamp it, or compute exponents of 4.
    full, floor: where a key that is kept may score as low as one that is masked by a finite number: the score with its
        masks, and the greatest of those numbers. Rows whose maximum is not above it have the softmax of `full`.
    coarse: whether the program itself rounds q·k to bf16, before anything else happens to it.
    dropout: the rate at which weights are dropped out, once they add up to 1.
    leaks: whether rows without keys send gradients to their scores: a finite number was added to each, beside which
        nothing is left of it, but whose derivative by it is 1.
    """

    score: sympy.Expr
    keep: sympy.Basic = sympy.true
    dead: Dead = "zero"
    operands: tuple[Operand, ...] = ()
    scalars: tuple[sympy.Symbol, ...] = ()
    sink: sympy.Expr | None = None
    band: Band = Band()
    far: bool = False
    full: sympy.Expr | None = None
    floor: sympy.Expr | None = None
    coarse: bool = False
    dropout: float = 0.0
    leaks: bool = False


@dataclass(frozen=True)
class MaskSpec:
    """What is known of a tile of scores before they are computed: everything that lists of tiles are made from.

    keep: as in `ScoreSpec`, and with it that what is added to the score is not -inf.
    even: loads of the score that may be one number for a whole tile.
    operands, scalars: as in `ScoreSpec`.
    """

    keep: sympy.Basic
    even: tuple[sympy.Expr, ...] = ()
    operands: tuple[Operand, ...] = ()
    scalars: tuple[sympy.Symbol, ...] = ()


@dataclass(frozen=True)
class Placed:
    """A tensor of an attention, and what each of its dimensions is.

    dims: for each dimension of `value` the logical axes that it holds, slowest first: () is a dimension of which one
        element is taken (`picks`), one axis is the usual case, several are a flattened run of axes.
    groups: for each axis that is shared, how many consecutive positions of it share one element (grouped heads).
    factor: a number that the tensor is multiplied by.
    """

    value: Value
    dims: tuple[tuple[sympy.Symbol, ...], ...]
    picks: tuple[sympy.Expr, ...]
    groups: tuple[tuple[sympy.Symbol, int], ...] = ()
    factor: sympy.Expr = sympy.S.One


@dataclass(frozen=True)
class AttentionSite:
    """softmax over the keys of a score of q·k, times v.

    root: the value that is replaced. lead: the batch axes (symbols) and their sizes, in the order of `root`.
    q, k, v: the same operand read ever less deeply, the deepest (fewest copies) first.
    score, keep, dead, sink, band, full, floor: as in `ScoreSpec`, over `loads`, the values that `Load(n, ...)` speaks
        of.
    queries, keys, head_dim, value_dim: sizes. layout: for each dimension of `root`, the axes that it holds.
    interior: the values between the products, which the replaced call never makes.
    """

    family: ClassVar[str] = "attention"

    root: Value
    lead: tuple[sympy.Symbol, ...]
    sizes: tuple[sympy.Expr, ...]
    q: tuple[Placed, ...]
    k: tuple[Placed, ...]
    v: tuple[Placed, ...]
    queries: sympy.Expr
    keys: sympy.Expr
    head_dim: sympy.Expr
    value_dim: sympy.Expr
    score: sympy.Expr
    keep: sympy.Basic
    dead: Literal["nan", "mean", "zero", "unknown"]
    alive: bool
    sink: sympy.Expr | None
    band: Band
    loads: tuple[Value, ...]
    dropout: float
    layout: tuple[tuple[sympy.Symbol, ...], ...]
    product_dtype: torch.dtype
    interior: tuple[Value, ...]
    mask: str
    leaks: bool = False
    """Whether a row without keys would send gradients to its scores: a finite fill was added, not put there."""
    one_fill: bool = False
    """Whether all masked keys are masked by one number, which is added."""
    full: sympy.Expr | None = None
    floor: sympy.Expr | None = None
    rounding: torch.dtype | None = None
    """The dtype in which large numbers are added to the scores of rows that may see no key: it says what is left."""
    added_in: torch.dtype = torch.float32
    """The dtype in which masks are added to scores."""
    order: Order = BIASES_FIRST
    """In which order masks and biases are added to scores."""
    call: Value | None = None
    """The `scaled_dot_product_attention` call, if the site is one."""


@dataclass(frozen=True)
class Bias:
    """A tensor that is added to a projection: `value`, whose dimension `dim` is read at `feature`; `expert`: another
    dimension, and the axis that it is; any others are of size 1."""

    value: Value
    dim: int
    feature: sympy.Expr
    expert: tuple[int, sympy.Expr] | None = None


@dataclass(frozen=True)
class Weight:
    """A weight of a linear: `value` and the order of its dimensions that gives [.., features out, features in]."""

    value: Value
    order: tuple[int, ...]


Layout = Literal["separate", "gate first", "up first", "gate even", "up even"]
"""Where the features of gate and up are: in two weights, or in one: as two halves, or as every other one."""


@dataclass(frozen=True)
class Down:
    """The linear that the product goes into, and nothing else does: `root` is its result."""

    root: Value
    weight: Weight
    bias: Value | None


@dataclass(frozen=True)
class GatedMLPSite:
    """A function of two projections of one input: act(x Wgᵀ + bg) * (x Wuᵀ + bu).

    root: the value that is replaced, [.., features]. formula: one element of it, of `activation.GATE` and `UP`.
    x: the input, and the order of its dimensions that gives [experts, rows.., features in], without experts where there
    are none. weights: one that is packed (`layout`), or gate's and up's. biases: gate's and up's, each or none.
    experts: how many inputs and weights stand beside each other (None: no such axis). rows, features, inner: sizes.
    dtype: of the projections. dropout: of the product. interior: the values that the replaced call never makes.
    """

    family: ClassVar[str] = "gated_mlp"

    root: Value
    formula: sympy.Expr
    x: Value
    x_order: tuple[int, ...]
    weights: tuple[Weight, ...]
    layout: Layout
    biases: tuple[Bias | None, Bias | None]
    experts: sympy.Expr | None
    rows: sympy.Expr
    features: sympy.Expr
    inner: sympy.Expr
    dtype: torch.dtype
    dropout: float
    interior: tuple[Value, ...]
    down: Down | None = None


@dataclass(frozen=True)
class Product:
    """x [.., K] times a weight, summed over K. `transposed`: the weight is [K, N], not [N, K]. dtype: of the result, to
    which autocast casts both."""

    x: Value
    weight: Value
    transposed: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class BiasActDropoutSite:
    """A function of one element of x + bias, dropped out, scaled by channel, with residuals added: all in one formula.

    root: the value that is replaced, [.., N]. formula: one element of it, over the symbols of `activation`.
    product: what makes x, which the program may have with its bias only; or x, any tensor.
    bias, vectors: along the last axis. A tensor of one element stands for N of them.
    tensors: each with the shape that it is broadcast to; in the order of elements, all are as the root is.
    dropout: the probability; 0 is none. dtype: of x. interior: the values that the replaced call never makes.
    """

    family: ClassVar[str] = "bias-act-dropout"

    root: Value
    formula: sympy.Expr
    product: Product | None
    x: Value | None
    bias: Value | None
    vectors: tuple[Value, ...]
    tensors: tuple[tuple[Value, tuple[Any, ...]], ...]
    features: int
    dropout: float
    dtype: torch.dtype
    interior: tuple[Value, ...]
    drawn: tuple[Value, ...] = ()
    """The dropout among them."""
