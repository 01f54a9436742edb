"""How the kernel for Hopper is written for a site: what its score allows, and which way was measured to be fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.codegen import FIRST, Pieces
from xfcompile.measured import Fact, Measured
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import ScoreSpec


@dataclass(frozen=True)
class Variant:
    """Ways to write the kernel.

    stages: tiles of keys and values in shared memory. warpgroups: how many compute, with 64 query rows each. turns:
    whether they give the tensor cores their products one after the other, so that one multiplies while another
    exponentiates. columns: what is added in proportion to a key's place the tensor cores add. bounded: no maximum is
    looked for, but `REFERENCE` taken off each score. tiles: a bias that has a number for each score is loaded by TMA
    too. persistent: as many programs as multiprocessors, each of which loads ahead of the piece of work that it is at.
    queued: they take the next piece when they are done with one. polynomials: how many of eight exponentials are
    (`exponential`).
    """

    stages: int
    warpgroups: int = 2
    turns: bool = False
    columns: bool = False
    bounded: bool = False
    tiles: bool = False
    persistent: bool = False
    queued: bool = False
    polynomials: int = 0

    @property
    def rows(self) -> int:
        """Query rows of a program."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> int:
        """Of a thread that computes; the warp that loads leaves it the rest."""
        return {2: 240, 3: 160}[self.warpgroups]


Kind = Literal["tiles", "columns", "bounded", "other"]
"""What a score allows: the field of `Variant` by that name, or none."""

Seen = Literal["all", "bounds", "some", "lists"]
"""Which keys a block of rows visits: all of them, those within closed bounds, or those of a list, which has the same
tiles for all blocks of a sequence, as a padding mask leaves them, or may have others."""

_MEASURED = Measured(
    "examples/bench_hopper_attention.py", "2026-11-29", "H200, torch 2.11, triton 3.6",
    "examples/results/hopper_attention_h200.json",
)  # fmt: skip

_POLYNOMIALS = replace(_MEASURED, date="2026-11-30")

# By (what the score allows, what is visited, columns of a tile). As many stages as there is room for.
#
# Persistent programs take pieces of work in turn. Where these are of different sizes one might get all the largest: of
# 12 blocks of rows a head, and 132 multiprocessors, always the same block. There they ask for the next one, or the
# hardware hands them out, the largest first. Lists are of 128 rows, which the backward takes them to be; and below a
# diagonal blocks of 192 rows compute about as much more in vain as they are faster elsewhere.
#
# A soft-capped score takes a tanh and an exponential, and 64 columns leave the multipliers time for some of the latter:
# with 4096 keys 1.53 ms in place of 1.58, 0.865 in place of 0.879 below a diagonal (see `LONG`). Elsewhere one of eight
# gains 3 % at most, and four cost up to 44 %.
#
# A bias of each score of 64 columns is the Triton kernel's, in 1.89 ms: this one's took 1.83 ... 2.07.
USUAL: dict[tuple[Kind, Seen, int], Fact[Variant]] = {
    ("other", "all", 64): Fact(Variant(4, 3, turns=True, persistent=True), _MEASURED),
    ("other", "all", 128): Fact(Variant(3, persistent=True), _MEASURED),
    ("other", "bounds", 64): Fact(Variant(4, queued=True), _MEASURED),
    ("other", "bounds", 128): Fact(Variant(3), _MEASURED),
    ("other", "some", 64): Fact(Variant(4, persistent=True), _MEASURED),
    ("other", "some", 128): Fact(Variant(3, persistent=True), _MEASURED),
    ("other", "lists", 64): Fact(Variant(4, queued=True), _MEASURED),
    ("other", "lists", 128): Fact(Variant(3), _MEASURED),
    ("columns", "all", 64): Fact(Variant(4, 3, turns=True, columns=True, persistent=True), _MEASURED),
    ("columns", "all", 128): Fact(Variant(2, turns=True, columns=True, persistent=True), _MEASURED),
    ("columns", "bounds", 64): Fact(Variant(4, columns=True)),
    ("columns", "bounds", 128): Fact(Variant(2, turns=True, columns=True)),
    ("columns", "some", 64): Fact(Variant(4, columns=True, persistent=True)),
    ("columns", "some", 128): Fact(Variant(2, turns=True, columns=True, persistent=True)),
    ("columns", "lists", 64): Fact(Variant(4, columns=True)),
    ("columns", "lists", 128): Fact(Variant(2, turns=True, columns=True)),
    ("bounded", "all", 64): Fact(Variant(4, 3, bounded=True, persistent=True, polynomials=2), _POLYNOMIALS),
    ("bounded", "all", 128): Fact(Variant(3, bounded=True, persistent=True), _MEASURED),
    ("bounded", "bounds", 64): Fact(Variant(4, bounded=True, queued=True, polynomials=2), _POLYNOMIALS),
    ("bounded", "bounds", 128): Fact(Variant(3, bounded=True, queued=True), _MEASURED),
    ("bounded", "some", 64): Fact(Variant(4, bounded=True, persistent=True)),
    ("bounded", "some", 128): Fact(Variant(3, bounded=True, persistent=True)),
    ("bounded", "lists", 64): Fact(Variant(4, bounded=True, queued=True)),
    ("bounded", "lists", 128): Fact(Variant(3, bounded=True)),
    ("tiles", "all", 128): Fact(Variant(2, tiles=True, queued=True), _MEASURED),
    ("tiles", "bounds", 128): Fact(Variant(2, tiles=True)),
}


def usual(spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype, width: int) -> Variant:
    """The variant of a site whose tiles have so many columns."""
    seen = seen_of(spec, pieces)
    fact = USUAL.get((kind_of(spec, pieces, dtype), seen, width), USUAL["other", seen, width])
    return fact.value


LONG = 4096
"""Keys from which some exponentials are a polynomial's. With 1024 keys, and blocks of 192 rows, a soft-capped forward
of 64 columns took 0.53 ms and, causal, 0.34 so, without 0.44 and 0.30; with 16384 keys 5.5 and 3.0, without 6.2 and 3.2
(an H200, examples/results/soft_cap_h200.json, examples/benchmarks/attention_h200.json)."""


def at_length(variant: Variant, keys: int) -> Variant:
    """The variant of a site's usual one for so many keys."""
    if variant.polynomials and keys < LONG:
        return replace(variant, polynomials=0, warpgroups=2)
    return variant


def kind_of(spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype) -> Kind:
    if tile_of(spec, pieces, dtype) is not None:
        return "tiles"
    if columns_of(spec, pieces.score) is not None:
        return "columns"
    # Weights in fp16 would not be finite; bf16 has fp32's exponents.
    return "bounded" if dtype == torch.bfloat16 and is_bounded(spec, pieces) else "other"


def seen_of(spec: ScoreSpec, pieces: Pieces) -> Seen:
    if pieces.names.listed:
        masks = [spec.keep, *(load for load in spec.score.atoms(Load) if J in load.free_symbols)]
        return "lists" if any({H, I} & x.free_symbols for x in masks) else "some"
    return "bounds" if spec.keep != sympy.true and spec.band.upper is not None else "all"


# -- bounded scores ------------------------------------------------------------------------------------------------

CAP, REFERENCE = 73.0, 20.0
"""Scores between -CAP and CAP, as exponents of 2, need no maximum: Gemma's are capped at 50, which is 72.1 there.
REFERENCE is taken off in its place, which makes weights 2**-93 ... 2**53. Their products with values above 2**-33 are
normal then, and sums of these over 4096 keys are finite, with values below 2**63. A reference of 0 would take no more
and no less time, and move both by 2**-20: to where values are still finite, but nothing is that small."""


def is_bounded(spec: ScoreSpec, pieces: Pieces) -> bool:
    """Whether no score is beyond CAP as an exponent of 2."""
    form = pieces.forms.usual
    if spec.sink is not None or form.scale is None or not form.core or form.shifted or template.wide(spec):
        return False
    (core,) = (term for term in sympy.Add.make_args(pieces.score) if S in term.free_symbols)
    return core.as_coeff_Mul()[1].func is sympy.tanh and form.scale * template.LOG2E <= CAP


# -- what goes by a key's place ------------------------------------------------------------------------------------

START = sympy.Symbol("start", integer=True, nonnegative=True)
"""The first key of a tile."""


@dataclass(frozen=True)
class Columns:
    """A score scale * (s + factor * (j - start)) + shift, where the last two are numbers for a whole tile."""

    scale: float
    factor: sympy.Expr
    shift: sympy.Expr


def columns_of(spec: ScoreSpec, score: sympy.Expr) -> Columns | None:
    """The score as that; None if it is something else."""
    cores = [term for term in sympy.Add.make_args(score) if S in term.free_symbols]
    if len(cores) != 1 or spec.full is not None or template.wide(spec):
        return None
    scale = cores[0] / S
    rest = sympy.expand(score - cores[0])
    slope = rest.coeff(J, 1)
    shift = sympy.expand(rest - slope * J)
    if not scale.is_positive or scale.free_symbols or {I, J} & (slope.free_symbols | shift.free_symbols):
        return None
    if slope == 0:
        return None
    scale = scale if scale.is_Number else scale.evalf(17)
    from_first = shift.coeff(FIRST, 1)
    if from_first == -slope:  # which is exact
        moved = slope * (START - FIRST) + sympy.expand(shift - from_first * FIRST)
    else:
        moved = slope * START + shift
    return Columns(float(scale), slope / scale, moved)


# -- a bias of each score ------------------------------------------------------------------------------------------


def bias_of(spec: ScoreSpec, dtype: torch.dtype) -> Load | None:
    """The one load that has a number for each score, if it can be read by TMA: [B or 1, H or 1, Lq, Lk], in the dtype
    of q, k and v."""
    varying = [load for load in spec.score.atoms(Load) if load.free_symbols >= {I, J}]
    if len(varying) != 1 or spec.operands[varying[0].operand].dtype != dtype:
        return None
    (load,) = varying
    place = place_of(load)
    if len(place) != 4 or place[2:] != (I, J):
        return None
    b, h = place[:2]
    return load if b in (0, B) and h in (0, H) else None


def place_of(load: Load) -> tuple[sympy.Expr, ...]:
    """Where in four dimensions a load is, of which those that an operand has not are 0."""
    indices = tuple(load.indices)
    return indices if len(indices) > 4 else (sympy.S.Zero,) * (4 - len(indices)) + indices


def tile_of(spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype) -> Load | None:
    """Such a bias where nothing else is loaded for each key, and no tiles are listed."""
    found = bias_of(spec, dtype)
    varying = {load for load in spec.score.atoms(Load) if J in load.free_symbols}
    return None if varying != {found} or pieces.names.listed or spec.keep.has(Load) else found
