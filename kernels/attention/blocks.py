"""Which tiles of scores a block of queries visits: a verdict a tile, gathered into the lists that the kernel walks.

A verdict comes from interval arithmetic over the bounds of a tile's positions and of the data in it, or, where a tensor
has a value of its own for each score, from all of the tile's elements. Lists are made once for a mask, whatever the
scores are, and shared by all attentions under it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import indent

import sympy
import torch

from xfcompile.intervals import UNKNOWN, Bounds, certain, possible
from xfcompile.kernels.attention.forward_text import HEAD, HELPERS
from xfcompile.kernels.attention.lists_text import LISTS, LISTS_BY_KEY
from xfcompile.kernels.attention.template import literal
from xfcompile.kernels.lines import wrapped
from xfcompile.kernels.printing.extent import guarded_loads, is_plain
from xfcompile.kernels.printing.printer import NAMES, Printer
from xfcompile.kernels.printing.rules import RULES
from xfcompile.kernels.printing.term import Term
from xfcompile.score import H, I, J, Load, S
from xfcompile.site import MaskSpec, ScoreSpec

SKIP, MASKED, WHOLE, EVEN = 0, 1, 2, 3
"""A tile's verdicts: no score is kept; some are; all are; all are, and the loads of `MaskSpec.even` do not vary."""

HEADER = 3
"""What a list begins with: how many tiles are even, how many are even or whole, how many are masked. The tiles follow,
in this order but for the masked ones, which stand at the end, the first of them last."""

LEAST = sympy.Float(torch.finfo(torch.float32).min, 17)
"""Only -inf is less."""

NEAR = 1e4
"""What even tiles have for all scores is no greater: scores survive what is added to them, which kernels rely on."""

I0, I1, J0, J1 = sympy.symbols("i0 i1 j0 j1", integer=True, nonnegative=True)
DISTANCE = sympy.Symbol("distance", integer=True)


@dataclass(frozen=True)
class Summary:
    """The mask of a score, and where it finds its own: operand and scalar n of `mask` are `operands[n]`, `scalars[n]`
    of the score's spec."""

    mask: MaskSpec
    operands: tuple[int, ...]
    scalars: tuple[sympy.Symbol, ...]


def summary(spec: ScoreSpec) -> Summary | None:
    """What lists of tiles depend on; None where closed bounds say as much."""
    even = even_loads(spec)
    if not even and (spec.keep == sympy.true or spec.band.exact):
        return None
    keep = sympy.And(spec.keep, *(sympy.Ge(load, LEAST) for load in even if load in _added(spec.score)))
    used = sorted({load.operand for x in (keep, *even) for load in sympy.sympify(x).atoms(Load)})
    numbers = {n: k for k, n in enumerate(used)}

    def renumber(x: sympy.Basic) -> sympy.Basic:
        return x.replace(lambda y: isinstance(y, Load), lambda y: Load(numbers[y.operand], *y.indices))

    symbols = set().union(*(sympy.sympify(x).free_symbols for x in (keep, *even)))
    scalars = tuple(x for x in spec.scalars if x in symbols)
    mask = MaskSpec(
        renumber(sympy.sympify(keep)),
        tuple(renumber(load) for load in even),
        tuple(spec.operands[n] for n in used),
        scalars,
    )
    return Summary(mask, tuple(used), scalars)


def even_loads(spec: ScoreSpec) -> tuple[Load, ...]:
    """The loads of a score that lists of tiles tell apart: see `MaskSpec.even`."""
    return tuple(dict.fromkeys(_summarised(spec)))


def _summarised(spec: ScoreSpec) -> Iterator[Load]:
    """Loads of the score that may be one number for many tiles, and whose bounds are cheap to find: they vary along
    keys or along a diagonal; or along queries and keys for all heads alike, as masks do and biases do not."""
    for load, guarded in guarded_loads(spec.score):
        if J not in load.free_symbols or S in load.free_symbols or (guarded and not is_plain(load)):
            continue
        if I not in load.free_symbols or along_diagonal(load) is not None or H not in load.free_symbols:
            yield load


def _added(score: sympy.Expr) -> set[Load]:
    """Loads that are added to the score as they are, or a positive number of times: -inf leaves nothing of it."""
    terms = (term.as_coeff_Mul() for term in sympy.Add.make_args(score))
    return {rest for coefficient, rest in terms if coefficient.is_positive and isinstance(rest, Load)}


def along_diagonal(load: Load) -> Load | None:
    """The load as a function of j - i, if it is one of nothing else."""
    moved = load.func(load.args[0], *(sympy.expand(x.xreplace({J: I + DISTANCE})) for x in load.indices))
    return moved if I not in moved.free_symbols and {I, J} <= load.free_symbols else None


def elementwise(mask: MaskSpec) -> bool:
    """Whether some tensor has a value of its own for each score."""
    loads = mask.keep.atoms(Load).union(mask.even)
    return any({I, J} <= load.free_symbols and along_diagonal(load) is None for load in loads)


# -- the text -----------------------------------------------------------------------------------------------------


TEXT = '''\
@triton.jit{options}
{signature}
    """Verdicts on TILES tiles of one block of queries: 0 is skipped, 1 masked, 2 whole, 3 whole and even."""
    tiles = (lk + BLOCK_N - 1) // BLOCK_N
    blocks = (lq + BLOCK_M - 1) // BLOCK_M
    chunks = (tiles + TILES - 1) // TILES
    pid = tl.program_id(0)
    row = pid // chunks
    h = row // blocks % heads
    b = row // blocks // heads
    i0 = row % blocks * BLOCK_M
    i1 = tl.minimum(i0 + BLOCK_M, lq) - 1
    verdict_ptr += tl.cast(row, tl.int64) * tiles
{body}
'''

CHUNK_BODY = """\
    t = pid % chunks * TILES + tl.arange(0, TILES)
    j0 = tl.minimum(t * BLOCK_N, lk - 1)
    j1 = tl.minimum(t * BLOCK_N + BLOCK_N, lk) - 1
{bounds}
    some = tl.full([TILES], True, tl.int1)
    every = t * BLOCK_N + BLOCK_N <= lk  # the last tile may be ragged
    even = tl.full([TILES], True, tl.int1)
{verdicts}
    verdict = tl.where(some, tl.where(every, tl.where(even, 3, 2), 1), 0)
    tl.store(verdict_ptr + t, verdict.to(tl.int8), mask=t < tiles)
"""

TILE_BODY = """\
    t = pid % chunks
    j0 = t * BLOCK_N
    j1 = tl.minimum(j0 + BLOCK_N, lk) - 1
    verdict = 0
    if {possible}:
        i = (i0 + tl.arange(0, BLOCK_M))[:, None]
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        if (i0 + BLOCK_M <= lq) & (j0 + BLOCK_N <= lk):
            # Of these it is known that they follow each other, and 16 bytes are read at once.
{look}
        else:
{look_at_edge}
        every = every & (j0 + BLOCK_N <= lk)  # the last tile may be ragged
        if some:
            verdict = 1
            if every:
                verdict = 2
                if even:
                    verdict = 3
    tl.store(verdict_ptr + t, tl.cast(verdict, tl.int8))
"""

LOOK = '''\
@triton.jit
{signature}
    """Of one tile, element by element: whether some scores are kept, all are, and what may be even is."""
    some = True
    every = True
    even = True
{lines}
    return some, every, even
'''


def generate(mask: MaskSpec) -> str:
    """The module's text. Raises Unsupported for what has no Triton form."""
    scope = NAMES | {x: x.name for x in mask.scalars} | {x: x.name for x in (I0, I1, J0, J1)}
    functions, body, helpers = (_tile if elementwise(mask) else _chunk)(mask, scope)
    arguments = [
        "verdict_ptr",
        *_outside(mask)[: len(mask.operands)],
        "heads",
        "lq",
        "lk",
        *_outside(mask)[len(mask.operands) :],
        "BLOCK_M: tl.constexpr",
        "BLOCK_N: tl.constexpr",
        "TILES: tl.constexpr",
        "SPAN: tl.constexpr",
    ]
    scalars = [x.name for x in mask.scalars]
    options = f"(do_not_specialize={scalars!r})" if scalars else ""
    text = TEXT.format(options=options, signature=wrapped("def tile_verdicts", arguments, ":"), body=body.rstrip("\n"))
    head = _docstring(mask) + HEAD.format(spec=_literal(mask))
    return "\n\n".join([head, *(HELPERS[x] for x in sorted(helpers)), *functions, text, LISTS, LISTS_BY_KEY])


def _outside(mask: MaskSpec) -> list[str]:
    """Arguments that say where tensors are, and the scalars."""
    return [
        *(f"t{n}_ptr" for n in range(len(mask.operands))),
        *(f"t{n}_stride{d}" for n, operand in enumerate(mask.operands) for d in range(operand.ndim)),
        *(x.name for x in mask.scalars),
    ]


def _docstring(mask: MaskSpec) -> str:
    lines = [f"keep   {mask.keep}"]
    lines += [f"even   {load}" for load in mask.even]
    lines += [
        f"t{n}     {str(x.dtype).removeprefix('torch.')}, {x.ndim} dimensions" for n, x in enumerate(mask.operands)
    ]
    return '"""Lists of the tiles under a mask, generated by xfcompile.\n\n' + "\n".join(lines) + '\n"""\n\n'


def _literal(mask: MaskSpec) -> str:
    return literal(
        {
            "keep": sympy.srepr(mask.keep),
            "even": [sympy.srepr(load) for load in mask.even],
            "operands": [(str(x.dtype).removeprefix("torch."), x.ndim) for x in mask.operands],
            "scalars": [sympy.srepr(x) for x in mask.scalars],
        }
    )


def _chunk(mask: MaskSpec, scope: Mapping[sympy.Symbol, str]) -> tuple[list[str], str, set[str]]:
    """Many tiles at once, by interval arithmetic."""
    printer = Printer(RULES, mask.operands, scope)
    lines: list[str] = []
    ends: dict[Load, Bounds] = {}
    # A load may be out of range where its neighbours in a conjunction do not hold.
    alone = isinstance(mask.keep, sympy.core.relational.Relational)

    def load(x: Load) -> Bounds:
        if x not in ends:
            ends[x] = _bounds(x, mask, printer, lines, len(ends)) if alone or is_plain(x) or x in mask.even else UNKNOWN
        return ends[x]

    box = {I: (I0, I1), J: (J0, J1)}
    some, every = possible(mask.keep, box, load), certain(mask.keep, box, load)
    even = sympy.And(*(sympy.And(sympy.Eq(*ends, evaluate=False), *_near(ends)) for ends in map(load, mask.even)))
    verdicts: list[str] = []
    for name, condition in (("some", some), ("every", every), ("even", even)):
        if condition != sympy.true:
            term = printer.print(condition)
            verdicts += [*printer.lines, f"{name} = {name} & ({term.text})"]
            printer.lines.clear()
    body = CHUNK_BODY.format(
        bounds="\n".join(f"    {line}" for line in lines), verdicts="\n".join(f"    {line}" for line in verdicts)
    )
    return [], body, printer.helpers


def _near(ends: Bounds) -> tuple[sympy.Basic, sympy.Basic]:
    return ends[0] >= -NEAR, ends[1] <= NEAR


def _bounds(x: Load, mask: MaskSpec, printer: Printer, lines: list[str], n: int) -> Bounds:
    """The least and the greatest element that a tile loads, as names of what the lines compute."""
    symbols = x.free_symbols & {I, J}
    whole = not mask.operands[x.operand].dtype.is_floating_point
    if not symbols:
        # One number for all tiles: read before conditions that each tile has its own of could stand around it.
        one = sympy.Symbol(f"one{n}", **{"integer" if whole else "real": True})
        inner = Printer(RULES, mask.operands, printer.names)
        value = inner.print(x).as_number().text
        printer.helpers |= inner.helpers
        lines += [*inner.lines, f"{one} = {value}"]
        printer.hoisted[one] = Term(one.name, "int" if whole else "float")
        return one, one
    low, high = (sympy.Symbol(f"{side}{n}", **{"integer" if whole else "real": True}) for side in ("low", "high"))
    axis, moved = 1, x
    if symbols == {I}:
        axis = 0
        lines += ["i = tl.minimum(i0 + tl.arange(0, BLOCK_M), i1)"]
    elif symbols == {J}:
        lines += ["j = tl.minimum(j0[:, None] + tl.arange(0, BLOCK_N)[None, :], j1[:, None])"]
    else:
        diagonal = along_diagonal(x)
        assert diagonal is not None
        moved = diagonal
        lines += ["distance = tl.minimum((j0 - i1)[:, None] + tl.arange(0, SPAN)[None, :], (j1 - i0)[:, None])"]
    inner = Printer(RULES, mask.operands, {**printer.names, DISTANCE: "distance"})
    term = inner.print(moved)
    printer.helpers |= inner.helpers
    value = f"tl.cast({term.text}, tl.int32)" if term.kind == "bool" else term.text
    lines += [*inner.lines, f"x = {value}"]
    lines += [
        f"{low} = tl.reduce(x, {axis}, tl.standard._elementwise_min)",
        f"{high} = tl.reduce(x, {axis}, tl.standard._elementwise_max)",
    ]
    if not whole:
        lines += [
            f"unordered = tl.reduce((x != x).to(tl.int32), {axis}, tl.standard._elementwise_max) > 0",
            f'{low} = tl.where(unordered, float("-inf"), {low})',
            f'{high} = tl.where(unordered, float("inf"), {high})',
        ]
    printer.hoisted |= {end: Term(end.name, "int" if whole else "float") for end in (low, high)}
    return low, high


def _tile(mask: MaskSpec, scope: Mapping[sympy.Symbol, str]) -> tuple[list[str], str, set[str]]:
    """One tile, element by element, unless its positions alone say that nothing is kept."""
    printer = Printer(RULES, mask.operands, scope)
    reachable = possible(mask.keep, {I: (I0, I1), J: (J0, J1)})
    if reachable.atoms(Load):
        reachable = sympy.true
    test = printer.print(reachable).text
    lines: list[str] = []
    if mask.keep != sympy.true:
        term = printer.print(mask.keep)
        lines += [
            *printer.lines,
            f"cells = ({term.text}) & (i >= 0) & (j >= 0)",
            f"kept = {_over_all('cells.to(tl.int32)', 'tl.standard._sum_combine')}",
            "some = kept > 0",
            "every = kept == BLOCK_M * BLOCK_N",
        ]
        printer.lines.clear()
    for load in mask.even:
        value = printer.print(load).as_float().text
        lines += [
            *printer.lines,
            f"x = {value} + tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)",
            f"even = even & ({_over_all('(x != x).to(tl.int32)', 'tl.standard._elementwise_max')} == 0)",
            f"low = {_over_all('x', 'tl.standard._elementwise_min')}",
            f"high = {_over_all('x', 'tl.standard._elementwise_max')}",
            f"even = even & (low == high) & (tl.abs(low) <= {NEAR})",
        ]
        printer.lines.clear()
    sizes = ("BLOCK_M", "BLOCK_N")
    signature = wrapped("def look", ["i", "j", "b", "h", *_outside(mask), *(f"{x}: tl.constexpr" for x in sizes)], ":")

    def call(i: str, j: str) -> str:
        return indent(wrapped("some, every, even = look", [i, j, "b", "h", *_outside(mask), *sizes]), " " * 12)

    body = TILE_BODY.format(
        possible=test, look=call("i", "j"), look_at_edge=call("tl.minimum(i, i1)", "tl.minimum(j, j1)")
    )
    return [LOOK.format(signature=signature, lines=indent("\n".join(lines), "    "))], body, printer.helpers


def _over_all(x: str, function: str) -> str:
    """What the elements of a tile come to."""
    return f"tl.reduce(tl.reduce({x}, 1, {function}), 0, {function})"
