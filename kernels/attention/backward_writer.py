"""What kernels of a backward have in common: the site's own functions, the gradient of a tile of scores, arguments."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace

import sympy

from xfcompile.kernels import philox
from xfcompile.kernels.attention import codegen, template
from xfcompile.kernels.attention.backward_text import KEYS, SEARCH
from xfcompile.kernels.attention.codegen import times
from xfcompile.kernels.attention.gradient import Gradients, LoadGradient
from xfcompile.kernels.attention.names import listed
from xfcompile.kernels.lines import returned, wrapped
from xfcompile.kernels.printing.arithmetic import LOG2E
from xfcompile.kernels.printing.extent import extent, guarded_loads, is_plain
from xfcompile.kernels.printing.printer import NAMES, Printer
from xfcompile.kernels.printing.rules import RULES
from xfcompile.kernels.printing.term import PRODUCT, Term
from xfcompile.score import I, J, Load, S
from xfcompile.site import ScoreSpec

CONSTANTS = [
    "DQ",
    "DV",
    "BLOCK_DQ",
    "BLOCK_DV",
    "BLOCK_M",
    "BLOCK_N",
    "PRECISION",
    "UPCAST",
    "EXACT",
    "EDGE_M",
    "EDGE_N",
]
"""Compile-time arguments that all kernels of a backward have. EXACT: whether weights come from the maximum and
the sum of a row, in base e until the one is subtracted, rather than from its log-sum-exp. EDGE_M, EDGE_N: whether the
last block of queries, or of keys, is ragged, or the last tile of a list, of which parts may lie beyond the end."""


FLAGS = "MASKED", "EDGE"
"""What says, where nothing else does, whether the site's mask applies, and whether a tile may be a last one."""


class Writer:
    """Writes the module of one spec: what its parts share is found once.

    tiles: loads that the site's own functions are given, in fp32, as tile0, tile1 ...
    slope, bend: the derivative of a score by s as a number that is the same for all, by which dq and dk are multiplied
    in the end, and what is each score's own, None where nothing is.
    """

    def __init__(self, spec: ScoreSpec, found: Gradients, tiles: Sequence[Load] = ()) -> None:
        self.spec = spec
        self.found = found
        self.tiles: dict[sympy.Basic, Term] = {load: Term(f"tile{n}", "float") for n, load in enumerate(tiles)}
        self.slope, own = found.apart(spec.scalars)
        self.bend = None if own == 1 else own
        self.exact = spec.far or template.wide(spec)
        # By how much more the forward has the score of a row than that of the one before, in a sum of its own.
        shift = codegen.of_first_row(spec)[1] if self.exact else sympy.S.Zero
        self.steep = sympy.expand(shift).coeff(I, 1)
        self.score = spec.score if self.exact else times(LOG2E, spec.score)
        self.listed = listed(spec)
        self.pointers = [f"t{n}_ptr" for n in range(len(spec.operands))]
        self.strides = [f"t{n}_stride{d}" for n, operand in enumerate(spec.operands) for d in range(operand.ndim)]
        self.scalars = [x.name for x in spec.scalars]
        self.scope = NAMES | {x: x.name for x in spec.scalars}
        self.random = ["seed", "layer", "stream"] if spec.dropout else []
        self.helpers: set[str] = set()
        expressions = [self.score, spec.keep, *(x.derivative for x in found.loads if x.kind != "sink")]
        if self.bend is not None:
            expressions.append(self.bend)
        tanh = any(x is not None and x.has(sympy.tanh) for x in (*expressions, spec.sink))
        self.flags = ["FAST"] if tanh else []
        self.rows, self.row_lines = self._hoisted("row", expressions)
        self.columns, self.column_lines = self._hoisted("column", expressions)

    def _hoisted(self, side: str, expressions: Sequence[sympy.Basic]) -> tuple[dict[sympy.Basic, Term], list[str]]:
        """Loads that a row, or a column, of scores has once: their names, and the lines that read them."""
        other = {S, J} if side == "row" else {S, I}
        loads: dict[Load, None] = {}
        for expr in expressions:
            for load, guarded in guarded_loads(expr):
                across = load.free_symbols & other or (side == "column" and J not in load.free_symbols)
                if not across and (is_plain(load) or not guarded):
                    loads[load] = None
        printer = Printer(RULES, self.spec.operands, self.scope)
        lines: list[str] = []
        names: dict[sympy.Basic, Term] = {}
        for n, load in enumerate(loads):
            term = printer.print(load)
            *before, last = printer.lines
            lines += [*before, f"{side}{n} = {last.split(' = ', 1)[1]}"]
            printer.lines.clear()
            names[load] = printer.hoisted[load] = replace(term, text=f"{side}{n}")
        self.helpers |= printer.helpers
        return names, lines

    @property
    def inside(self) -> list[str]:
        """What the site's own functions are given beside s and the position."""
        return [
            *self.pointers, *self.strides, *self.scalars,
            *(t.text for t in (*self.rows.values(), *self.columns.values(), *self.tiles.values())),
        ]  # fmt: skip

    @property
    def site(self) -> str:
        return ", ".join(["b", "h", "i", "j", *self.inside, *self.flags])

    def _function(
        self,
        name: str,
        arguments: Sequence[str],
        expr: sympy.Basic,
        *,
        real: bool,
        tile: bool = False,
        site: bool = True,
    ) -> str:
        """A function of the site's own. real: as a number in fp32; tile: of the shape of s; site: whether it is given
        what rows and columns have read, as those of a position are."""
        printer = Printer(
            RULES, self.spec.operands, self.scope, {**self.rows, **self.columns, **self.tiles} if site else {}
        )
        term = printer.float(expr) if real else printer.print(expr)
        self.helpers |= printer.helpers
        value = term.text
        if tile and extent(expr) != {I, J}:
            value = f"tl.full(s.shape, 0.0, tl.float32) + {term.at(PRODUCT)}"
        body = "".join(f"    {line}\n" for line in [*printer.lines, *returned(value)])
        return f"@triton.jit\n{wrapped(f'def {name}', arguments, ':')}\n{body}"

    def functions(self) -> list[str]:
        spec = self.spec
        site = ["b", "h", "i", "j", *self.inside, *(f"{flag}: tl.constexpr" for flag in self.flags)]
        made = [self._function("exact_score", ["s", *site], spec.score, real=True, tile=True)]
        if not self.exact:
            made.append(self._function("score", ["s", *site], self.score, real=True, tile=True))
        own = ["b", "h", "i", *self.pointers, *self.strides, *self.scalars, *site[len(site) - len(self.flags) :]]
        if self.steep != 0:
            made.append(self._function("steep", own, self.steep, real=True, site=False))
        if spec.sink is not None:
            made.append(self._function("sink", own, spec.sink, real=True, site=False))
        if spec.keep != sympy.true:
            made.append(self._function("keep", site, spec.keep, real=False))
        if self.bend is not None:
            made.append(self._function("bend", ["s", *site], self.bend, real=True, tile=True))
        for n, x in self.found.of("rows", "columns", "dense", "diagonal"):
            if x.derivative != 1:
                made.append(self._function(f"by_load{n}", ["s", *site], x.derivative, real=True, tile=True))
        for side, bound in (("lower", spec.band.lower), ("upper", spec.band.upper)):
            if bound is not None:
                made.append(self._function(side, ["i", *self.scalars], bound, real=False, site=False))
                made.append(
                    SEARCH.format(
                        side=side,
                        parameters=", ".join(["lq", *self.scalars]),
                        arguments=", ".join(["mid", *self.scalars]),
                    )
                )
        return made

    # -- the gradient of a tile of scores ----------------------------------------------------------------------

    def masked(self, *, edge: str, scores: Sequence[str], flags: tuple[str, str] = FLAGS) -> list[str]:
        """Scores x, -inf where masked. edge: what is inside of the last tile. flags: what says whether the site's mask
        applies, and whether the tile may be a last one."""
        masked = 'x = tl.where({}, x, float("-inf"))'
        masks = [] if self.spec.keep == sympy.true else [(flags[0], masked.format(f"keep({self.site})"))]
        masks.append((flags[1], masked.format(edge)))
        return [*scores, *(line for flag, mask in masks for line in (f"if {flag}:", f"    {mask}"))]

    def scores(self, *, across: bool = False, edge: str = KEYS, flags: tuple[str, str] = FLAGS) -> list[str]:
        """From s to the weights p of [M, N], or of [N, M] with `across`; see `masked`."""
        rows, log2e = ("None, :" if across else ":, None"), float(LOG2E)
        exact = f"p = tl.exp2((x - top[{rows}]) * {log2e!r}) * inverse[{rows}]"
        lines = self.masked(edge=edge, scores=self._score_lines(), flags=flags)
        if self.exact:
            return [*lines, exact]
        return [*lines, "if EXACT:", f"    {exact}", "else:", f"    p = tl.exp2(x - (top * {log2e!r})[{rows}])"]

    def _score_lines(self) -> list[str]:
        exact, other = (f"x = {name}(s, {self.site})" for name in ("exact_score", "score"))
        return [exact] if self.exact else ["if EXACT:", f"    {exact}", "else:", f"    {other}"]

    def by(self, n: int, x: LoadGradient) -> str:
        return "1.0" if x.derivative == 1 else f"by_load{n}(s, {self.site})"

    def times(self, name: str, factor: str, edge: str) -> list[str]:
        """`name` as dx times a function of the score, which may be infinite or NaN at an edge, where dx is 0."""
        return [f"{name} = dx * {factor}", "if EDGE:", f"    {name} = tl.where({edge}, {name}, 0.0)"]

    def sums(self, name: str, sums: Sequence[tuple[int, LoadGradient]], axis: int, edge: str) -> list[str]:
        """Adds the gradients by loads up over one axis of the tile."""
        lines = []
        for n, x in sums:
            term = "dx"
            if x.derivative != 1:
                term = f"dload{n}"
                lines += self.times(term, self.by(n, x), edge)
            lines.append(f"{name}{n} += tl.reduce({term}, {axis}, tl.standard._sum_combine)")
        return lines

    def ds(self, edge: str) -> list[str]:
        return ["ds = dx"] if self.bend is None else self.times("ds", f"bend(s, {self.site})", edge)

    def dropped(self, name: str, across: bool = False) -> list[str]:
        """Drops out what the forward did, of weights or of their gradients, and makes the others larger by as much."""
        if not self.spec.dropout:
            return []
        scaled = f"{name} = {name} * {philox.scale(self.spec.dropout)!r}"
        if not across:
            return [scaled, *template.dropped(self.spec, name)]
        rows = "(start + tl.arange(0, BLOCK_M))[:, None]"
        lines = template.dropped(self.spec, name, "tl.trans({})", "queries", "first")
        return [scaled, f"queries = {rows}", *lines]

    def kept(self, across: bool) -> list[str]:
        return ["kept = p", *self.dropped("kept", across)]

    def times_slope(self) -> str:
        if self.slope == 1:
            return ""
        printer = Printer(RULES, self.spec.operands, self.scope)
        return f" * {printer.float(self.slope).at(7)}"

    def place(self, heads: str, head: str) -> str:
        return indented(template.batch_and_head(self.spec, heads, head))

    # -- signatures ----------------------------------------------------------------------------------------------

    def options(self, lists: bool = True) -> str:
        free = [*self.scalars, *(["list_b", "list_h"] if self.listed and lists else [])]
        free += ["stream"] if self.random else []
        return f"(do_not_specialize={free!r})" if free else ""

    def signature(
        self,
        name: str,
        tensors: Sequence[str],
        axes: Sequence[tuple[str, str]],
        constants: Sequence[str],
        numbers: Sequence[str] = (),
        lists: bool = True,
    ) -> str:
        lists = lists and self.listed
        arguments = [
            *tensors,
            *self.pointers,
            *(["list_ptr"] if lists else []),
            *(["seed_ptr"] if self.random else []),
            *(f"stride_{x}{d}" for x, dims in axes for d in dims),
            *numbers,
            "heads",
            "group",
            "lq",
            "lk",
            *self.strides,
            *self.scalars,
            *(["list_b", "list_h"] if lists else []),
            *(["stream"] if self.random else []),
            *constexprs([*constants, *(["LISTED", "PARTS_M", "PARTS_N"] if lists else [])]),
        ]
        return wrapped(f"def {name}", arguments, ":")


def constexprs(names: Sequence[str]) -> list[str]:
    return [f"{name}: tl.constexpr" for name in names]


def indented(lines: Sequence[str], depth: int = 1) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)
