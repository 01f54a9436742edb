"""What the generated functions of a forward call their arguments, and how a step computes scores."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from xfcompile.kernels.lines import constexprs
from xfcompile.site import ScoreSpec

COMMON = ["b", "h", "i", "lk", "k_ptr", "v_ptr", "stride_kn", "stride_kd", "stride_vn", "stride_vd"]
CONSTANTS = ["DQ", "DV", "BLOCK_DQ", "BLOCK_DV", "BLOCK_N", "PRECISION", "UPCAST"]


@dataclass(frozen=True)
class Names:
    """The argument lists that generated functions share."""

    pointers: list[str]
    strides: list[str]
    scalars: list[str]
    rows: list[str]
    flags: list[str]
    listed: bool
    evens: list[str]
    first: list[str]
    random: list[str]

    @staticmethod
    def of(spec: ScoreSpec, rows: int, evens: int, first: bool) -> Names:
        return Names(
            pointers=[f"t{n}_ptr" for n in range(len(spec.operands))],
            strides=[f"t{n}_stride{d}" for n, operand in enumerate(spec.operands) for d in range(operand.ndim)],
            scalars=[x.name for x in spec.scalars],
            rows=[f"row{n}" for n in range(rows)],
            # Inputs of 16 bits allow a faster tanh: the rounding of the weights to them is 10000 times its error. One
            # instruction will do where the program itself rounds q·k to bf16, which errs by 2**-9 (`exactness.speed`).
            flags=["UNIT", "FAST"]
            if any(x is not None and x.has(sympy.tanh) for x in (spec.score, spec.keep, spec.sink))
            else ["UNIT"],
            listed=listed(spec),
            evens=[f"even{n}" for n in range(evens)],
            first=["first"] if first else [],
            random=["seed", "layer", "stream"] if spec.dropout else [],
        )

    @property
    def outside(self) -> list[str]:
        return self.pointers + self.strides + self.scalars

    @property
    def inside(self) -> list[str]:
        return self.outside + self.rows + self.first

    @property
    def flag_parameters(self) -> list[str]:
        return constexprs(self.flags)


@dataclass(frozen=True)
class Form:
    """How a step computes the scores of a tile.

    scale, core, shifted: they are scale * UNIT * s; with `core`, s is what a function of the site's own makes of it,
    and with `shifted` another gives a number that is added. None: a function gives all of it.
    """

    scale: float | None = None
    core: bool = False
    shifted: bool = False


@dataclass(frozen=True)
class Forms:
    """Of any tile, and of an even one (None: there are none), with the lines and the values that read what is one
    number for the tile at `ahead`. row_shift: whether scores are as of the block's first row, from which others differ
    by what a function gives."""

    usual: Form
    even: Form | None = None
    even_lines: tuple[str, ...] = ()
    even_values: tuple[str, ...] = ()
    row_shift: bool = False


def listed(spec: ScoreSpec) -> bool:
    """Whether the kernel takes lists of tiles."""
    from xfcompile.kernels.attention.blocks import summary

    return summary(spec) is not None


def more_flags(spec: ScoreSpec, names: Names) -> list[str]:
    """Those of a step's compile-time flags that not every kernel has."""
    return [*(["AGAIN"] if spec.full is not None else []), *(["EVEN"] if names.evens else [])]
