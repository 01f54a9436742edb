"""From a score to the text of its module: where the site's own functions go into what is the same for all."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from xfcompile.kernels import philox
from xfcompile.kernels.attention.forward_text import DEAD, FAR, FUNCTIONS, HEAD, HELPERS, KERNEL, MEAN_OF_SOME, TILE
from xfcompile.score import B, I, J, Load
from xfcompile.site import Band, ScoreSpec


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
        return [f"{flag}: tl.constexpr" for flag in self.flags]


WIDTH = 116

NEAR = 128.0
"""Beside a score that is higher by this, in base e, one has a weight of 0 in fp32."""

LOG2E = math.log2(math.e)

POWER = f"POWER: tl.constexpr = {LOG2E!r} / UNIT"
"""The exponent of 2 that a score of 1 is in a kernel: see `unit`."""


def far_loads(spec: ScoreSpec) -> set[Load]:
    """Loads whose products with log2(e) may not be finite although they are."""
    if not spec.far:
        return set()
    scores = [x for x in (spec.score, spec.full, spec.sink) if x is not None]
    found = {load for x in scores for load in x.atoms(Load)}
    return {x for x in found if spec.operands[x.operand].dtype in (torch.bfloat16, torch.float32, torch.float64)}


def unit(spec: ScoreSpec, dtype: torch.dtype) -> float:
    """What a kernel multiplies scores by, with the least operations or roundings.

    Halves: log2(e), which merges with the constants of a score, as they are exponents of 2 then. fp32: 1. The maximum
    is subtracted from scores as the program has them, which hardly rounds, and what is left multiplied: a rounding of a
    large score is an error of its weight.
    """
    if dtype == torch.float32:
        return 1.0
    return LOG2E / 2 if wide(spec) else LOG2E


def wide(spec: ScoreSpec) -> bool:
    """Whether scores of halves are exponents of 4, of which finfo.min stays finite. That takes an operation a score;
    what is the same for a whole row is clamped instead, which takes one a row and tells no keys apart that eager does
    not."""
    numbers = {x for score in (spec.score, spec.sink) if score is not None for x in score.atoms(sympy.Number)}
    if spec.full is not None or any(x.is_finite and abs(x) > FAR for x in numbers):
        return True
    compared = spec.keep.atoms(Load)
    return any(J in load.free_symbols or load in compared for load in far_loads(spec))


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


def needs_mean(spec: ScoreSpec) -> bool:
    """Whether there may be rows that see no key and get the mean of all values."""
    return spec.dead == "mean" and spec.sink is None and spec.keep != sympy.true


def listed(spec: ScoreSpec) -> bool:
    """Whether the kernel takes lists of tiles."""
    from xfcompile.kernels.attention.blocks import summary

    return summary(spec) is not None


def module(
    spec: ScoreSpec,
    forms: Forms,
    names: Names,
    row_lines: Sequence[str],
    functions: Sequence[str],
    helpers: Iterable[str],
) -> str:
    """The whole text.

    row_lines: read what a row has for the whole loop. functions, helpers: the site's own functions, and the names of
    those in HELPERS that they call.
    """
    parts = [
        _docstring(spec) + HEAD.format(spec=literal(fields(spec))),
        FUNCTIONS,
        *([philox.TEXT] if spec.dropout else []),
        *(HELPERS[name] for name in sorted(helpers)),
        *functions,
        _tile(spec, forms, names),
        _kernel(spec, forms, names, row_lines),
    ]
    return "\n\n".join(parts)


def _docstring(spec: ScoreSpec) -> str:
    return f'"""Attention forward, generated by xfcompile.\n\n{meaning(spec)}\n"""\n\n'


def meaning(spec: ScoreSpec) -> str:
    """What a kernel computes, a line an expression."""
    lines = [f"score  {spec.score}", f"keep   {spec.keep}", f"dead   {spec.dead}"]
    if spec.sink is not None:
        lines.append(f"sink   {spec.sink}")
    if spec.far:
        lines.append("far    scores may be finite, and their products with log2(e) not")
    if spec.coarse:
        lines.append("coarse the program itself rounds q·k to bf16")
    if spec.dropout:
        lines.append(f"drops  {spec.dropout} of the weights")
    if spec.leaks:
        lines.append("leaks  rows without keys send gradients to their scores")
    if spec.full is not None:
        lines.append(f"full   {spec.full}, for rows not above {spec.floor}")
    if spec.band != Band():
        lines.append(f"band   {spec.band.lower} <= j < {spec.band.upper}{', exact' if spec.band.exact else ''}")
    for n, operand in enumerate(spec.operands):
        lines.append(f"t{n}     {str(operand.dtype).removeprefix('torch.')}, {operand.ndim} dimensions")
    return "\n".join(lines)


def fields(spec: ScoreSpec) -> dict[str, object]:
    """The spec as a dict of strings, which `cache.parse` turns back."""

    def text(expr: sympy.Basic | None) -> str | None:
        return None if expr is None else sympy.srepr(expr)

    return {
        "score": text(spec.score),
        "keep": text(spec.keep),
        "dead": spec.dead,
        "operands": [(str(x.dtype).removeprefix("torch."), x.ndim) for x in spec.operands],
        "scalars": [text(x) for x in spec.scalars],
        "sink": text(spec.sink),
        "lower": text(spec.band.lower),
        "upper": text(spec.band.upper),
        "exact": spec.band.exact,
        "far": spec.far,
        "full": text(spec.full),
        "floor": text(spec.floor),
        "coarse": spec.coarse,
        "dropout": spec.dropout,
        "leaks": spec.leaks,
    }


def literal(fields: Mapping[str, object]) -> str:
    """A dict, a line an entry."""
    return "{\n" + "".join(f"    {key!r}: {value!r},\n" for key, value in fields.items()) + "}"


def wrapped(prefix: str, items: Iterable[str], suffix: str = "") -> str:
    """`prefix(a, b, c)suffix`, on as many lines as it takes."""
    # Lines break between items only: spaces inside them are hidden meanwhile.
    text = ", ".join(item.replace(" ", "\0") for item in items) + ")" + suffix
    return "\n".join(_fill(text, f"{prefix}(", " " * (len(prefix) + 1))).replace("\0", " ")


def returned(text: str) -> list[str]:
    """`return text`, in parentheses where it takes several lines."""
    return [f"return {text}"] if len(text) < WIDTH - 12 else ["return (", *_fill(text, "    ", "    "), ")"]


def _fill(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def _indented(text: str, depth: int = 1) -> str:
    return textwrap.indent(text.rstrip("\n"), "    " * depth)


COMMON = ["b", "h", "i", "lk", "k_ptr", "v_ptr", "stride_kn", "stride_kd", "stride_vn", "stride_vd"]
CONSTANTS = ["DQ", "DV", "BLOCK_DQ", "BLOCK_DV", "BLOCK_N", "PRECISION", "UPCAST"]


def _tile(spec: ScoreSpec, forms: Forms, names: Names) -> str:
    site = ", ".join(["b", "h", "i", "j", *names.inside, *names.flags])
    lines = [
        "offs_n = start + tl.arange(0, BLOCK_N)[None, :]",
        "j = offs_n",
        "if EDGE:",
        "    j = tl.minimum(j, lk - 1)",
    ]
    usual = [*scores(spec, forms.usual, site), *_masks(spec, site), *softmax(forms.usual, site)]
    if forms.even is not None:
        with_evens = ", ".join([site, *names.evens])
        even = scores(spec, forms.even, with_evens, "even_")
        even += softmax(forms.even, with_evens, "even_")
        lines += ["if EVEN:", *(f"    {line}" for line in even), "else:", *(f"    {line}" for line in usual)]
    else:
        lines += usual
    lines += [
        "alpha = tl.exp2((m - m_safe) * POWER)",
        "l = l * alpha + tl.reduce(p, 1, tl.standard._sum_combine)",
        *dropped(spec, "p"),
    ]
    flags = ["MASKED", "EDGE", *_more_flags(spec, names)]
    arguments = ["acc", "m", "l", "q", "start", *COMMON, *names.inside, *names.random, *names.evens]
    arguments += _constexprs([*CONSTANTS, *names.flags, *flags])
    return TILE.format(signature=wrapped("def tile", arguments, ":"), power=POWER, body=_indented("\n".join(lines)))


def scores(spec: ScoreSpec, form: Form, site: str, prefix: str = "") -> list[str]:
    """The scores that the online softmax takes: all of them, or what is scaled and shifted later."""
    if form.scale is not None:
        return [f"s = {prefix}core(s, {site})"] if form.core else []
    if spec.full is not None and not prefix:
        return ["if AGAIN:", f"    s = full_score(s, {site})", "else:", f"    s = score(s, {site})"]
    return [f"s = {prefix}score(s, {site})"]


def dropped(spec: ScoreSpec, weights: str, kept: str = "{}", rows: str = "i", start: str = "start") -> list[str]:
    """Drops some of [M, N] weights out, or of what has the same places. rows [M, 1]: their queries; start: the first
    of their keys; kept: how what is kept is turned."""
    if not spec.dropout:
        return []
    groups = f"({start} // 8 + tl.arange(0, BLOCK_N // 8))[None, :]"
    numbers = f"{philox.threshold(spec.dropout)}, {rows}.shape[0], BLOCK_N"
    kept = kept.format(f"keep_groups(seed, {groups}, {rows}, layer, stream, {numbers})")
    return [f"{weights} = tl.where({kept}, {weights}, 0.0)"]


RANDOM = ["seed = tl.load(seed_ptr)", "layer = b * heads + h"]
"""What dropout's random numbers depend on, beside a weight's place and the stream of its site."""


def _masks(spec: ScoreSpec, site: str) -> list[str]:
    masked = 's = tl.where({}, s, float("-inf"))'
    masks = [] if spec.keep == sympy.true else ["if MASKED:", f"    {masked.format(f'keep({site})')}"]
    return [*masks, "if EDGE:", f"    {masked.format('offs_n < lk')}"]


ROW_MAXIMUM = "tl.reduce(s, 1, tl.standard._elementwise_max)"


def softmax(form: Form, site: str, prefix: str = "", highest: str = ROW_MAXIMUM) -> list[str]:
    """The maximum m_new and the weights p. Where scores are scale * s + shift, the scale joins the exponent's
    multiply-add, and the shift the maximum that is subtracted there."""
    safe = [
        "# A row that has seen no key yet: its weights must be 0, and -inf - -inf is not.",
        'm_safe = tl.where(m_new == float("-inf"), 0.0, m_new)',
    ]
    if form.scale is None:
        return [f"m_new = tl.maximum(m, {highest})", *safe, "p = tl.exp2((s - m_safe[:, None]) * POWER)  # [M, N]"]
    scale = f"({form.scale!r} * UNIT)"
    added = [f"added = {prefix}shift({site})"] if form.shifted else []
    above = f"{highest} * {scale}" + (" + added" if form.shifted else "")
    below = "added - m_safe" if form.shifted else "-m_safe"
    return [
        *added,
        f"m_new = tl.maximum(m, {above})",
        *safe,
        "if UNIT == 1:  # not rounded before the maximum is off",
        f"    p = tl.exp2((s * {scale} + ({below})[:, None]) * POWER)  # [M, N]",
        "else:",
        f"    p = tl.exp2(s * ({form.scale!r} * UNIT * POWER) + (({below}) * POWER)[:, None])",
    ]


def _more_flags(spec: ScoreSpec, names: Names) -> list[str]:
    """Those of a step's compile-time flags that not every kernel has."""
    return [*(["AGAIN"] if spec.full is not None else []), *(["EVEN"] if names.evens else [])]


def _constexprs(names: Iterable[str]) -> list[str]:
    return [f"{name}: tl.constexpr" for name in names]


def step(names: Names, *, masked: bool, edge: bool, again: bool | None = None, even: bool = False) -> str:
    """A call of `tile`. again: whether it is in the second pass, None where there is none."""
    flags = [masked, edge, *([] if again is None else [again]), *([even] if names.evens else [])]
    evens = names.evens if even else ["0.0" for _ in names.evens]
    arguments = ["acc", "m", "l", "q", "start", *COMMON, *names.inside, *names.random, *evens, *CONSTANTS, *names.flags]
    return wrapped("    acc, m, l = tile", [*arguments, *map(str, flags)])


def _loop(
    names: Names,
    start: str,
    end: str,
    *,
    masked: bool,
    edge: bool,
    again: bool | None,
    even: bool = False,
    listed: str | None = None,
) -> str:
    """A loop over tiles. listed: the place in the list of the tile number n; `start` and `end` are places then."""
    call = step(names, masked=masked, edge=edge, again=again, even=even)
    if listed is None:
        return f"for start in tl.range({start}, {end}, BLOCK_N):\n{call}"
    return "\n".join(
        [f"for n in tl.range({start} * PARTS_N, {end} * PARTS_N):", f"    start = {listed_at('n', listed)}", call]
    )


def listed_at(n: str, place: str, mask: str = "") -> str:
    """Where a tile begins whose number stands in a list."""
    return f"(tl.load(list_ptr + {place}{mask}) * PARTS_N + {n} % PARTS_N) * BLOCK_N"


def _even_loop(names: Names, forms: Forms, again: bool | None) -> str:
    """The loop over even tiles. What is one number for a tile is read one step ahead: nothing waits for it."""
    loop = _loop(names, "0", "evens", masked=False, edge=False, again=again, even=True, listed="3 + n // PARTS_N")
    head, start, *body = loop.splitlines()
    return "\n".join(
        [
            f"ahead = {listed_at('0', '3', ', mask=evens > 0, other=0')}",
            *forms.even_lines,
            *(f"{name} = {value}" for name, value in zip(names.evens, forms.even_values, strict=True)),
            head,
            start,
            "    n_next = tl.minimum(n + 1, evens * PARTS_N - 1)",
            f"    ahead = {listed_at('n_next', '3 + n_next // PARTS_N')}",
            *(f"    {line}" for line in forms.even_lines),
            *(f"    {name}_next = {value}" for name, value in zip(names.evens, forms.even_values, strict=True)),
            *body,
            *(f"    {name} = {name}_next" for name in names.evens),
        ]
    )


def _loops(spec: ScoreSpec, forms: Forms, names: Names) -> str:
    """Tiles of three kinds: wholly kept ones are not masked, ones that may be ragged are masked by range as well."""
    again = None if spec.full is None else False
    loop = functools.partial(_loop, names, again=again)
    bounded = bounded_loops(spec, names.scalars, loop)
    if not names.listed:
        return bounded
    front, back = "3 + n // PARTS_N", "2 + tiles - n // PARTS_N"
    lines = [
        "if LISTED:",
        "    # Lists of the tiles to visit: `xfcompile.kernels.attention.blocks`.",
        "    tiles = (lk + BLOCK_N * PARTS_N - 1) // (BLOCK_N * PARTS_N)",
        "    rows = (lq + BLOCK_M * PARTS_M - 1) // (BLOCK_M * PARTS_M)",
        "    place = (b * list_b + h * list_h) * rows + block // PARTS_M",
        "    list_ptr += tl.cast(place, tl.int64) * (tiles + 3)",
        "    evens = tl.load(list_ptr)",
        "    wholes = tl.load(list_ptr + 1)",
        "    masked = tl.load(list_ptr + 2)",
        *([_indented(_even_loop(names, forms, again))] if names.evens else []),
        _indented(loop("evens" if names.evens else "0", "wholes", masked=False, edge=False, listed=front)),
        _indented(loop("0", "masked", masked=True, edge=True, listed=back)),
        "else:",
        _indented(bounded),
    ]
    return "\n".join(lines)


def bounded_loops(spec: ScoreSpec, scalars: Sequence[str], loop: Callable[..., str], edge: bool | str = True) -> str:
    """Loops between closed bounds on the keys of a block of queries.

    loop: (start, end, *, masked, edge) -> the text of one. edge: whether the last tile of keys may be ragged, or the
    name of the flag that says so.
    """
    if spec.keep == sympy.true:
        ragged = loop("full", "lk", masked=False, edge=True)
        return "\n".join(
            [
                "full = lk // BLOCK_N * BLOCK_N",
                loop("0", "full", masked=False, edge=False),
                ragged if edge is True else f"if {edge}:\n{_indented(ragged)}",
            ]
        )

    def bound(side: str, row: str) -> str:
        if getattr(spec.band, side) is None:
            return "0" if side == "lower" else "lk"
        return f"clamp({side}({', '.join([row, *scalars])}), lk)"

    tiles = " // BLOCK_N * BLOCK_N" if spec.band.lower is not None else ""
    last = ["last = tl.minimum(first + BLOCK_M, lq) - 1"] if spec.band != Band() else []
    lines = [*last, f"lo = {bound('lower', 'first')}{tiles}", f"hi = {bound('upper', 'last')}"]
    if not spec.band.exact:
        return "\n".join([*lines, loop("lo", "hi", masked=True, edge=edge)])
    lo_full = f"tl.minimum(({bound('lower', 'last')} + BLOCK_N - 1) // BLOCK_N * BLOCK_N, hi)"
    lines += [
        "# Every row of the block sees every key from lo_full to hi_full.",
        f"lo_full = {lo_full if spec.band.lower is not None else 'lo'}",
        f"hi_full = tl.maximum({bound('upper', 'first')} // BLOCK_N * BLOCK_N, lo_full)",
    ]
    if spec.band.lower is not None:
        lines.append(loop("lo", "lo_full", masked=True, edge=edge))
    lines.append(loop("lo_full", "hi_full", masked=False, edge=False))
    lines.append(loop("hi_full", "hi", masked=True, edge=edge))
    return "\n".join(lines)


def _again(spec: ScoreSpec, names: Names, state: Sequence[str]) -> str:
    """Rows that score as low as masked keys do see all keys after all."""
    if spec.full is None or spec.floor is None:
        return ""
    lines = [
        "# Rows whose scores are as low as those of masked keys see these too.",
        f"low = m <= {float(spec.floor) + NEAR!r} * UNIT",
        "if tl.reduce(low.to(tl.int32), 0, tl.standard._elementwise_max) > 0:",
        "    acc_kept, m_kept, l_kept = acc, m, l",
        *(f"    {line}" for line in state),
        "    acc = tl.full([BLOCK_M, BLOCK_DV], 0.0, tl.float32)",
        _indented(_loop(names, "0", "lk", masked=False, edge=True, again=True)),
        "    acc = tl.where(low[:, None], acc, acc_kept)",
        "    m = tl.where(low, m, m_kept)",
        "    l = tl.where(low, l, l_kept)",
    ]
    return "\n".join(lines)


def lse(forms: Forms, names: Names, row: str = "row", first: str = "first") -> str:
    """The log-sum-exp of a row with maximum m and weights that add up to l."""
    text = f"m * (1.0 / UNIT) + tl.log2(l) * {math.log(2)}"
    shift = ", ".join(["b", "h", row, first, *names.outside, *names.flags])
    return f"{text} + row_shift({shift})" if forms.row_shift else text


def dense_loads(spec: ScoreSpec) -> list[Load]:
    """What each score loads for itself."""
    return [load for load in spec.score.atoms(Load) if {I, J} <= load.free_symbols]


def batches_share(spec: ScoreSpec) -> bool:
    """Whether all batches load the same for a score, or some of it."""
    return any(B not in load.free_symbols for load in dense_loads(spec))


LARGE = 4 << 20
"""Elements of a bias that does not stay in an L2 cache while all heads of a batch are computed. One that does is better
read for each batch: heads of a batch, whose rows are neighbours in memory, then follow each other. A forward of 2048
windows of 144 keys took 0.34 ms so, with a mask of each window added, and 0.76 with batches after each other, without
one (H200, examples/results/few_keys_h200.json)."""


def batch_and_head(spec: ScoreSpec, heads: str, head: str) -> list[str]:
    """Of which batch and head a program is: batches that share a large bias follow each other, and find it cached."""
    if not batches_share(spec):
        return [f"b = pid // blocks // {heads}", f"{head} = pid // blocks % {heads}"]
    return [
        f"each = blocks * {heads}", "batch = tl.num_programs(0) // each",
        f"large = tl.cast(lq, tl.int64) * lk * {heads} > {LARGE}",
        "b = tl.where(large, pid % batch, pid // each)", "pid = tl.where(large, pid // batch, pid % each)",
        f"{head} = pid // blocks",
    ]  # fmt: skip


def _place(spec: ScoreSpec) -> str:
    """Which block of which batch and head a program has, in an order that keeps in the L2 cache what programs share."""
    lines = batch_and_head(spec, "heads", "h")
    if batches_share(spec):
        lines = ["# All batches load the same tile of the bias: one after the other, where it is large.", *lines]
    if spec.keep != sympy.true and spec.band.upper is not None:
        return "\n".join([*lines, "block = blocks - 1 - pid % blocks  # the last rows see most keys: start with them"])
    return "\n".join([*lines, "block = pid % blocks"])


def _dead(spec: ScoreSpec) -> str:
    """What becomes of rows without keys."""
    kind = "nan" if spec.sink is not None else spec.dead
    if kind == "mean" and spec.dropout:
        return MEAN_OF_SOME.format(dropped=_indented("\n".join(dropped(spec, "p")), 2))
    return DEAD[kind]


def _kernel(spec: ScoreSpec, forms: Forms, names: Names, row_lines: Sequence[str]) -> str:
    qkv = [f"stride_{x}{d}" for x, dims in (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd")) for d in dims]
    lists = ["list_ptr", "list_b", "list_h"] if names.listed else []
    pointers = ["q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", *names.pointers, *lists[:1]]
    stream = ["stream"] if spec.dropout else []
    pointers += ["seed_ptr"] if spec.dropout else []
    state = ['m = tl.full([BLOCK_M], float("-inf"), tl.float32)', "l = tl.full([BLOCK_M], 0.0, tl.float32)"]
    if spec.sink is not None:
        arguments = ["b", "h", "row", *names.outside, *names.flags]
        state = [
            "# The sink is there before any key: it has weight but no value.",
            f"m = sink({', '.join(arguments)}) + tl.full([BLOCK_M], 0.0, tl.float32)",
            'l = tl.where(m == float("-inf"), 0.0, 1.0)',
        ]
    arguments = [*pointers, *qkv, "heads", "group", "lq", "lk", *names.strides, *names.scalars, *lists[1:]]
    arguments += stream
    constants = [
        *CONSTANTS,
        *names.flags,
        "BLOCK_M",
        "HEADS_FIRST",
        *(["LISTED", "PARTS_M", "PARTS_N"] if lists else []),
    ]
    unspecialized = [*names.scalars, *lists[1:], *stream]
    return KERNEL.format(
        jit_options=f"(do_not_specialize={unspecialized!r})" if unspecialized else "",
        signature=wrapped("def attention_forward", [*arguments, *_constexprs(constants)], ":"),
        place=_indented(_place(spec)),
        rows=_indented("\n".join([*row_lines, *(RANDOM if spec.dropout else [])])),
        scale=f" * {philox.scale(spec.dropout)!r}" if spec.dropout else "",
        state=_indented("\n".join(state)),
        loops=_indented(_loops(spec, forms, names)),
        again=_indented(_again(spec, names, state)),
        # With a sink a row has weights even without keys; where the sink is -inf too they are 0 / 0.
        dead=_indented(_dead(spec)),
        lse=lse(forms, names),
    )
