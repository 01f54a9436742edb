"""From a `ScoreSpec` to the text of its backward: kernels for dq, for dk and dv, and for gradients of what is added.

With x = score(s), p = exp(x - lse), dp = dout v^T and delta = sum(dout * out), the gradient of a score is
dx = p (dp - delta) (Dao et al., FlashAttention-2, 2023). `sympy` gives dx/ds for dq and dk, and dx/dload for each load
that needs a gradient. Nothing but lse is kept of the forward; every tile is computed anew, in two kernels that each own
what they write: no atomics, the same numbers every time.

In fp32, and of scores that may be far from 0, lse says too little: it is rounded, and beside finfo.min nothing is left
of the number of keys. The first kernel then finds the maximum and the sum of a row anew: p = exp(x - max) / sum. Of
16-bit inputs it does so where a log-sum-exp is far from 0 indeed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy

from xfcompile.kernels import philox
from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.backward_text import (
    DENSE_PLACE,
    DENSE_STORE,
    DIAGONAL_PLACE,
    DIAGONAL_STORE,
    DKDV_KERNEL,
    DQ_KERNEL,
    HELPER,
    KEYS,
    LOAD_KERNEL,
    QUERIES,
    SCORES,
    SEARCH,
    TALL,
)
from xfcompile.kernels.attention.codegen import times
from xfcompile.kernels.attention.forward_text import FUNCTIONS, HEAD, HELPERS
from xfcompile.kernels.attention.gradient import Gradients, LoadGradient, gradients
from xfcompile.kernels.attention.printer import LOG2E, NAMES, PRODUCT, Printer, Term, extent, guarded_loads, is_plain
from xfcompile.kernels.attention.template import returned, wrapped
from xfcompile.score import B, H, I, J, Load, S
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
last block of queries, or of keys, is ragged."""


@dataclass(frozen=True)
class Backward:
    """A generated backward: its text, what it differentiates, and what of the scores its kernels are given.

    slope: the factor of dq and dk that is the same for all scores, None where the text has it for each.
    listed: whether the kernels take lists of tiles. exact: whether they are `EXACT` whatever the dtype.
    """

    text: str
    gradients: Gradients
    slope: sympy.Expr | None
    listed: bool
    exact: bool


def generate(spec: ScoreSpec, needed: Sequence[int]) -> Backward:
    """The module of a canonical spec, for gradients of q, k, v and of the operands that are `needed`.

    Raises Unsupported for what cannot be differentiated, or has no Triton form.
    """
    found = gradients(spec, needed)
    return _Writer(spec, found).module(tuple(needed))


FLAGS = "MASKED", "EDGE"
Loop = Callable[..., str]
"""(start, end, *, masked, edge) -> the text of a loop between the two."""


class _Writer:
    """Writes the module of one spec: what its parts share is found once."""

    def __init__(self, spec: ScoreSpec, found: Gradients) -> None:
        self.spec = spec
        self.found = found
        constant = not found.slope.free_symbols - set(spec.scalars) and not found.slope.has(Load)
        self.slope = found.slope if constant else None
        self.exact = spec.far or template.wide(spec)
        self.score = spec.score if self.exact else times(LOG2E, spec.score)
        self.listed = template.listed(spec)
        self.pointers = [f"t{n}_ptr" for n in range(len(spec.operands))]
        self.strides = [f"t{n}_stride{d}" for n, operand in enumerate(spec.operands) for d in range(operand.ndim)]
        self.scalars = [x.name for x in spec.scalars]
        self.scope = NAMES | {x: x.name for x in spec.scalars}
        self.random = ["seed", "layer", "stream"] if spec.dropout else []
        self.helpers: set[str] = set()
        expressions = [self.score, spec.keep, *(x.derivative for x in found.loads if x.kind != "sink")]
        if self.slope is None:
            expressions.append(found.slope)
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
        printer = Printer(self.spec.operands, self.scope)
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
            *(t.text for t in self.rows.values()), *(t.text for t in self.columns.values()),
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
        printer = Printer(self.spec.operands, self.scope, {**self.rows, **self.columns} if site else {})
        term = printer.float(expr) if real else printer.print(expr)
        self.helpers |= printer.helpers
        value = term.text
        if tile and extent(expr) != {I, J}:
            value = f"tl.full(s.shape, 0.0, tl.float32) + {term.at(PRODUCT)}"
        body = "".join(f"    {line}\n" for line in [*printer.lines, *returned(value)])
        return f"@triton.jit\n{wrapped(f'def {name}', arguments, ':')}\n{body}"

    def _functions(self) -> list[str]:
        spec = self.spec
        site = ["b", "h", "i", "j", *self.inside, *(f"{flag}: tl.constexpr" for flag in self.flags)]
        made = [self._function("exact_score", ["s", *site], spec.score, real=True, tile=True)]
        if not self.exact:
            made.append(self._function("score", ["s", *site], self.score, real=True, tile=True))
        if spec.sink is not None:
            own = ["b", "h", "i", *self.pointers, *self.strides, *self.scalars, *site[len(site) - len(self.flags) :]]
            made.append(self._function("sink", own, spec.sink, real=True, site=False))
        if spec.keep != sympy.true:
            made.append(self._function("keep", site, spec.keep, real=False))
        if self.slope is None:
            made.append(self._function("slope", ["s", *site], self.found.slope, real=True, tile=True))
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

    def module(self, needed: tuple[int, ...]) -> Backward:
        functions = self._functions()
        kernels = [self._dq(), self._dkdv(), *(self._load(n, x) for n, x in self.found.of("dense", "diagonal"))]
        fields = template.fields(self.spec) | {"needed": needed}
        lines = [template.meaning(self.spec), f"slope  {self.found.slope}"]
        lines += [f"d/d{x.load}  {x.derivative}, {x.kind}" for x in self.found.loads]
        head = '"""Attention backward, generated by xfcompile.\n\n' + "\n".join(lines) + '\n"""\n\n'
        text = "\n\n".join(
            [
                head + HEAD.format(spec=template.literal(fields)),
                FUNCTIONS,
                HELPER,
                *([philox.TEXT] if self.random else []),
                *(HELPERS[name] for name in sorted(self.helpers)),
                *functions,
                *kernels,
            ]
        )
        return Backward(text, self.found, self.slope, self.listed, self.exact)

    # -- the gradient of a tile of scores ----------------------------------------------------------------------

    def _masked(self, *, edge: str, scores: Sequence[str], flags: tuple[str, str] = FLAGS) -> list[str]:
        """Scores x, -inf where masked. edge: what is inside of the last tile. flags: what says whether the site's mask
        applies, and whether the tile may be a last one."""
        masked = 'x = tl.where({}, x, float("-inf"))'
        masks = [] if self.spec.keep == sympy.true else [(flags[0], masked.format(f"keep({self.site})"))]
        masks.append((flags[1], masked.format(edge)))
        return [*scores, *(line for flag, mask in masks for line in (f"if {flag}:", f"    {mask}"))]

    def _scores(self, *, across: bool = False, edge: str = KEYS, flags: tuple[str, str] = FLAGS) -> list[str]:
        """From s to the weights p of [M, N], or of [N, M] with `across`; see `_masked`."""
        rows, log2e = ("None, :" if across else ":, None"), float(LOG2E)
        exact = f"p = tl.exp2((x - top[{rows}]) * {log2e!r}) * inverse[{rows}]"
        lines = self._masked(edge=edge, scores=self._score_lines(), flags=flags)
        if self.exact:
            return [*lines, exact]
        return [*lines, "if EXACT:", f"    {exact}", "else:", f"    p = tl.exp2(x - (top * {log2e!r})[{rows}])"]

    def _score_lines(self) -> list[str]:
        exact, other = (f"x = {name}(s, {self.site})" for name in ("exact_score", "score"))
        return [exact] if self.exact else ["if EXACT:", f"    {exact}", "else:", f"    {other}"]

    def _by(self, n: int, x: LoadGradient) -> str:
        return "1.0" if x.derivative == 1 else f"by_load{n}(s, {self.site})"

    def _times(self, name: str, factor: str, edge: str) -> list[str]:
        """`name` as dx times a function of the score, which may be infinite or NaN at an edge, where dx is 0."""
        return [f"{name} = dx * {factor}", "if EDGE:", f"    {name} = tl.where({edge}, {name}, 0.0)"]

    def _sums(self, name: str, sums: Sequence[tuple[int, LoadGradient]], axis: int, edge: str) -> list[str]:
        """Adds the gradients by loads up over one axis of the tile."""
        lines = []
        for n, x in sums:
            term = "dx"
            if x.derivative != 1:
                term = f"dload{n}"
                lines += self._times(term, self._by(n, x), edge)
            lines.append(f"{name}{n} += tl.reduce({term}, {axis}, tl.standard._sum_combine)")
        return lines

    def _ds(self, edge: str) -> list[str]:
        return ["ds = dx"] if self.slope is not None else self._times("ds", f"slope(s, {self.site})", edge)

    def _dropped(self, name: str, across: bool = False) -> list[str]:
        """Drops out what the forward did, of weights or of their gradients, and makes the others larger by as much."""
        if not self.spec.dropout:
            return []
        scaled = f"{name} = {name} * {philox.scale(self.spec.dropout)!r}"
        if not across:
            return [scaled, *template.dropped(self.spec, name)]
        rows = "(start + tl.arange(0, BLOCK_M))[:, None]"
        lines = template.dropped(self.spec, name, "tl.trans({})", "queries", "first")
        return [scaled, f"queries = {rows}", *lines]

    def _kept(self, across: bool) -> list[str]:
        return ["kept = p", *self._dropped("kept", across)]

    def _times_slope(self) -> str:
        if self.slope is None or self.slope == 1:
            return ""
        printer = Printer(self.spec.operands, self.scope)
        return f" * {printer.float(self.slope).at(7)}"

    # -- dq ----------------------------------------------------------------------------------------------------

    def _dq(self) -> str:
        sums = self.found.of("rows")
        names = [f"drow{n}" for n, _ in sums]
        loaded = ["k_ptr", "v_ptr", "stride_kn", "stride_kd", "stride_vn", "stride_vd"]
        free = [*self.pointers, *self.strides, *self.scalars, *(t.text for t in self.rows.values()), *self.random]
        constants = [*CONSTANTS, *self.flags, "NEED_DQ"]
        arguments = ["dq", *names, "q", "dout", "top", "inverse", "delta", "start", "b", "h", "i", "lk", *loaded, *free]
        signature = wrapped("def dq_tile", [*arguments, *_constexprs([*constants, "MASKED", "EDGE"])], ":")
        lines = [
            "k = load_rows(k_ptr, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, EDGE)",
            "v = load_rows(v_ptr, start, lk, stride_vn, stride_vd, DV, BLOCK_N, BLOCK_DV, EDGE)",
            "if UPCAST:",
            "    k = k.to(tl.float32)",
            "    v = v.to(tl.float32)",
            SCORES.format("q, tl.trans(k)", "[M, N]"),
            "dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)",
            "offs_n = start + tl.arange(0, BLOCK_N)[None, :]",
            "j = offs_n",
            "if EDGE:",
            "    j = tl.minimum(j, lk - 1)",
            *self.column_lines,
            *self._scores(),
            *self._dropped("dp"),
            "dx = p * (dp - delta[:, None])",
            *self._sums("drow", sums, 1, KEYS),
            "if NEED_DQ:",
            *(f"    {line}" for line in self._ds(KEYS)),
            "    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)",
            f"return {', '.join(['dq', *names])}",
        ]
        tile = f"@triton.jit\n{signature}\n{_indented(lines)}\n"
        first_arguments = ["m", "l", "q", "start", "b", "h", "i", "lk", "k_ptr", "stride_kn", "stride_kd", *free]
        first_signature = wrapped(
            "def row_tile", [*first_arguments, *_constexprs([*constants[:-1], "MASKED", "EDGE"])], ":"
        )
        first_lines = [
            "k = load_rows(k_ptr, start, lk, stride_kn, stride_kd, DQ, BLOCK_N, BLOCK_DQ, EDGE)",
            "if UPCAST:",
            "    k = k.to(tl.float32)",
            SCORES.format("q, tl.trans(k)", "[M, N]"),
            "offs_n = start + tl.arange(0, BLOCK_N)[None, :]",
            "j = offs_n",
            "if EDGE:",
            "    j = tl.minimum(j, lk - 1)",
            *self.column_lines,
            *self._masked(edge=KEYS, scores=[f"x = exact_score(s, {self.site})"]),
            "m_new = tl.maximum(m, tl.reduce(x, 1, tl.standard._elementwise_max))",
            "m_safe = without_keys(m_new, 0.0)",
            f"p = tl.exp2((x - m_safe[:, None]) * {float(LOG2E)!r})",
            f"l = l * tl.exp2((m - m_safe) * {float(LOG2E)!r}) + tl.reduce(p, 1, tl.standard._sum_combine)",
            "return m_new, l",
        ]
        first = f"@triton.jit\n{first_signature}\n{_indented(first_lines)}\n"
        state = ['m = tl.full([BLOCK_M], float("-inf"), tl.float32)', "l = tl.full([BLOCK_M], 0.0, tl.float32)"]
        if self.spec.sink is not None:
            own = ", ".join(["b", "h", "row", *self.pointers, *self.strides, *self.scalars, *self.flags])
            state = [
                f"m = sink({own}) + tl.full([BLOCK_M], 0.0, tl.float32)",
                'l = tl.where(m == float("-inf"), 0.0, 1.0)',
            ]

        def step(*, masked: bool, edge: bool | str) -> str:
            target = f"    {', '.join(['dq', *names])} = dq_tile"
            return wrapped(target, [*arguments, *constants, str(masked), str(edge)])

        def first_step(*, masked: bool, edge: bool | str) -> str:
            return wrapped("    m, l = row_tile", [*first_arguments, *constants[:-1], str(masked), str(edge)])

        loops = self._key_loops(step)
        tensors = ["q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "lse_ptr", "pair_ptr", "inverse_ptr"]
        tensors.append("dq_ptr")
        tensors += [f"{name}_ptr" for name in names]
        axes = (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("o", "bhmd"), ("g", "bhmd"), ("d", "bhmd"))
        upper = self.spec.keep != sympy.true and self.spec.band.upper is not None
        stores = [f"tl.store({name}_ptr + vector + offs_m, {name}, mask=offs_m < lq)" for name in names]
        kernel = DQ_KERNEL.format(
            options=self._options(),
            signature=self._signature("attention_backward_dq", tensors, axes, [*constants, "LOOP", "ALWAYS"]),
            more=", and sums of gradients over its keys" if names else "",
            # The last rows see most keys under a causal mask: they start first.
            block="blocks - 1 - pid % blocks" if upper else "pid % blocks",
            place=self._place("heads", "h"),
            rows=_indented([*self.row_lines, *(template.RANDOM if self.random else [])], 2),
            tall=TALL,
            state=_indented(state, 4),
            first_loops=_indented(self._key_loops(first_step).splitlines(), 4),
            sums=_indented([f"{name} = tl.full([BLOCK_M], 0.0, tl.float32)" for name in names], 2),
            loops=_indented(loops.splitlines(), 2),
            stores=_indented(stores, 2),
            slope=self._times_slope(),
        )
        return f"{first}\n\n{tile}\n\n{kernel}"

    def _key_loops(self, step: Callable[..., str]) -> str:
        def loop(start: str, end: str, *, masked: bool, edge: bool | str, listed: str | None = None) -> str:
            body = step(masked=masked, edge=edge)
            if listed is None:
                return f"for start in tl.range({start}, {end}, BLOCK_N):\n{body}"
            head = f"for n in tl.range({start} * PARTS_N, {end} * PARTS_N):"
            place = f"(tl.load(key_list + {listed}) * PARTS_N + n % PARTS_N) * BLOCK_N"
            return "\n".join([head, f"    start = {place}", body])

        bounded = template.bounded_loops(self.spec, self.scalars, loop, "EDGE_N")
        if not self.listed:
            return bounded
        front, back = "3 + n // PARTS_N", "2 + tiles - n // PARTS_N"
        lines = [
            "if LISTED:",
            "    tiles = (lk + BLOCK_N * PARTS_N - 1) // (BLOCK_N * PARTS_N)",
            "    rows = (lq + BLOCK_M * PARTS_M - 1) // (BLOCK_M * PARTS_M)",
            "    place = (b * list_b + h * list_h) * rows + block // PARTS_M",
            "    key_list = list_ptr + tl.cast(place, tl.int64) * (tiles + 3)",  # the list is walked twice
            "    wholes = tl.load(key_list + 1)",
            "    masked = tl.load(key_list + 2)",
            _indented(loop("0", "wholes", masked=False, edge=False, listed=front).splitlines()),
            _indented(loop("0", "masked", masked=True, edge="EDGE_N", listed=back).splitlines()),
            "else:",
            _indented(bounded.splitlines()),
        ]
        return "\n".join(lines)

    def _query_loops(self, loop: Loop) -> str:
        """Loops between closed bounds on the queries of a block of keys, which `_query_range` has found."""
        band = self.spec.band
        if self.spec.keep == sympy.true:
            return "\n".join(
                [
                    "full = lq // BLOCK_M * BLOCK_M",
                    loop("0", "full", masked=False, edge=False),
                    "if EDGE_M:",
                    _indented(loop("full", "lq", masked=False, edge=True).splitlines()),
                ]
            )
        if not band.exact:
            return loop("lo", "hi", masked=True, edge="EDGE_M")
        return "\n".join(
            [
                *([loop("lo", "lo_full", masked=True, edge="EDGE_M")] if band.upper is not None else []),
                loop("lo_full", "hi_full", masked=False, edge=False),
                loop("hi_full", "hi", masked=True, edge="EDGE_M"),
            ]
        )

    def _query_range(self) -> list[str]:
        """Which rows see some key of the block (lo to hi), and which see all of them (lo_full to hi_full)."""
        band = self.spec.band
        if self.spec.keep == sympy.true:
            return []
        rest = ", ".join(["lq", *self.scalars])
        lines = ["last = tl.minimum(first + BLOCK_N, lk) - 1", "lo = 0", "hi = lq"]
        if band.upper is not None:
            lines[1] = f"lo = first_row_upper(first, {rest}) // BLOCK_M * BLOCK_M"
        if band.lower is not None:
            lines[2] = f"hi = first_row_lower(last, {rest})"
        if not band.exact:
            return lines
        lo_full, hi_full = "lo", "lq"
        if band.upper is not None:
            lo_full = f"tl.minimum((first_row_upper(last, {rest}) + BLOCK_M - 1) // BLOCK_M * BLOCK_M, hi)"
        if band.lower is not None:
            hi_full = f"first_row_lower(first, {rest})"
        return [*lines, f"lo_full = {lo_full}", f"hi_full = tl.maximum({hi_full} // BLOCK_M * BLOCK_M, lo_full)"]

    # -- dk and dv -----------------------------------------------------------------------------------------------

    def _dkdv(self) -> str:
        sums = self.found.of("columns")
        names = [f"dcolumn{n}" for n, _ in sums]
        loaded = [
            "q_head",
            "dout_head",
            "pair_head",
            "inverse_head",
            "stride_qm",
            "stride_qd",
            "stride_gm",
            "stride_gd",
        ]
        free = [*self.pointers, *self.strides, *self.scalars, *(t.text for t in self.columns.values()), *self.random]
        free += ["first"] if self.random else []
        constants = [*CONSTANTS, *self.flags, "NEED_DX", "NEED_DK", "NEED_DV"]
        arguments = ["dk", "dv", *names, "k", "v", "start", "b", "h", "j", "lq", *loaded, *free]
        signature = wrapped("def dkdv_tile", [*arguments, *_constexprs([*constants, "MASKED", "EDGE"])], ":")
        lines = [
            "q = load_rows(q_head, start, lq, stride_qm, stride_qd, DQ, BLOCK_M, BLOCK_DQ, EDGE)",
            "dout = load_rows(dout_head, start, lq, stride_gm, stride_gd, DV, BLOCK_M, BLOCK_DV, EDGE)",
            "top, delta = load_pairs(pair_head, start, lq, BLOCK_M, EDGE)",
            "inverse = load_vector(inverse_head, start, lq, BLOCK_M, EDGE) if EXACT else top",
            "if UPCAST:",
            "    q = q.to(tl.float32)",
            "    dout = dout.to(tl.float32)",
            SCORES.format("k, tl.trans(q)", "[N, M]"),
            "offs_m = start + tl.arange(0, BLOCK_M)[None, :]",
            "i = offs_m",
            "if EDGE:",
            "    i = tl.minimum(i, lq - 1)",
            *self.row_lines,
            *self._scores(across=True, edge=QUERIES),
            "if NEED_DV:",
            *(f"    {line}" for line in self._kept(across=True)),
            "    dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)",
            "if NEED_DX:",
            "    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)",
            *(f"    {line}" for line in self._dropped("dp", across=True)),
            "    dx = p * (dp - delta[None, :])",
            *(f"    {line}" for line in self._sums("dcolumn", sums, 1, QUERIES)),
            "    if NEED_DK:",
            *(f"        {line}" for line in self._ds(QUERIES)),
            "        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)",
            f"return {', '.join(['dk', 'dv', *names])}",
        ]
        tile = f"@triton.jit\n{signature}\n{_indented(lines)}\n"

        def step(*, masked: bool, edge: bool | str) -> str:
            target = f"    {', '.join(['dk', 'dv', *names])} = dkdv_tile"
            return wrapped(target, [*arguments, *constants, str(masked), str(edge)])

        def loop(start: str, end: str, *, masked: bool, edge: bool | str, listed: str | None = None) -> str:
            body = step(masked=masked, edge=edge)
            if listed is None:
                return f"for start in tl.range({start}, {end}, BLOCK_M):\n{body}"
            place = f"(tl.load(row_list + {listed}) * PARTS_M + t % PARTS_M) * BLOCK_M"
            head = f"for t in tl.range({start} * PARTS_M, {end} * PARTS_M):"
            return "\n".join([head, f"    start = {place}", body])

        loops = self._query_loops(loop)
        if self.listed:
            front, back = "3 + t // PARTS_M", "2 + rows - t // PARTS_M"
            loops = "\n".join(
                [
                    "if LISTED:",
                    "    tiles = (lk + BLOCK_N * PARTS_N - 1) // (BLOCK_N * PARTS_N)",
                    "    rows = (lq + BLOCK_M * PARTS_M - 1) // (BLOCK_M * PARTS_M)",
                    "    place = (b * list_b + h * list_h) * tiles + block // PARTS_N",
                    "    row_list = list_ptr + tl.cast(place, tl.int64) * (rows + 3)",
                    "    wholes = tl.load(row_list + 1)",
                    "    masked = tl.load(row_list + 2)",
                    "    # The last rows may be ragged, whatever the mask.",
                    _indented(loop("0", "wholes", masked=False, edge="EDGE_M", listed=front).splitlines()),
                    _indented(loop("0", "masked", masked=True, edge="EDGE_M", listed=back).splitlines()),
                    "else:",
                    _indented(loops.splitlines()),
                ]
            )
        tensors = ["q_ptr", "k_ptr", "v_ptr", "dout_ptr", "pair_ptr", "inverse_ptr", "dk_ptr", "dv_ptr"]
        tensors += [f"{name}_ptr" for name in names]
        axes = (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("g", "bhmd"), ("d", "bhnd"), ("e", "bhnd"))
        stores = [
            f"tl.store({name}_ptr + (tl.cast(b, tl.int64) * heads + h) * lk + offs_n, {name}, mask=offs_n < lk)"
            for name in names
        ]
        kernel = DKDV_KERNEL.format(
            options=self._options(),
            signature=self._signature("attention_backward_dkdv", tensors, axes, constants),
            more=", and sums of gradients over its queries" if names else "",
            place=self._place("kv_heads", "kv_head"),
            bounds=_indented(self._query_range()),
            columns=_indented([*self.column_lines, *(template.RANDOM if self.random else [])], 2),
            sums=_indented([f"{name} = tl.full([BLOCK_N], 0.0, tl.float32)" for name in names], 2),
            loops=_indented(loops.splitlines(), 2),
            stores=_indented(stores, 2),
            slope=self._times_slope(),
        )
        return f"{tile}\n\n{kernel}"

    def _place(self, heads: str, head: str) -> str:
        """Which batch and head a program has: batches that share a bias follow each other, and find it in the cache."""
        dense = [load for load in self.spec.score.atoms(Load) if {I, J} <= load.free_symbols]
        if any(B not in load.free_symbols for load in dense):
            return _indented(
                [
                    f"batch = tl.num_programs(0) // (blocks * {heads})",
                    "b = pid % batch",
                    "pid = pid // batch",
                    f"{head} = pid // blocks",
                ]
            )
        return _indented([f"b = pid // blocks // {heads}", f"{head} = pid // blocks % {heads}"])

    # -- loads ---------------------------------------------------------------------------------------------------

    def _load(self, n: int, x: LoadGradient) -> str:
        spec = self.spec
        dense = x.kind == "dense"
        skip: list[str] = []
        for side, bound, test in (
            ("upper", spec.band.upper, "first_tile * BLOCK_N >= {}(tl.minimum((first_row + 1) * BLOCK_M, lq) - 1{})"),
            ("lower", spec.band.lower, "(first_tile + 1) * BLOCK_N <= {}(first_row * BLOCK_M{})"),
        ):
            if bound is not None:
                scalars = "".join(f", {name}" for name in self.scalars)
                skip += [f"if {test.format(side, scalars)}:", "    steps = 0  # no score of the tile is kept"]
        body = [
            SCORES.format("q, tl.trans(k)", "[M, N]"),
            "dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)",
            *self._scores(flags=("True", "EDGE_N")),
            *self._dropped("dp"),
            "dx = p * (dp - delta[:, None])",
        ]
        tensors = ["q_ptr", "k_ptr", "v_ptr", "dout_ptr", "pair_ptr", "inverse_ptr", "dload_ptr"]
        axes = [("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("g", "bhmd")]
        if dense:
            axes.append(("l", "bhmn"))
        place = DENSE_PLACE.format(skip=_indented(skip)) if dense else DIAGONAL_PLACE
        return LOAD_KERNEL.format(
            options=self._options(lists=False),
            signature=self._signature(
                f"attention_backward_load{n}", tensors, axes, [*CONSTANTS, *self.flags], numbers=["batch"], lists=False
            ),
            load=x.load,
            what="of a tile of scores" if dense else "of the tiles along one diagonal, whose scores are as far apart",
            batches="batch" if B in x.axes else "1",
            own_heads="heads" if H in x.axes else "1",
            batch="own_b" if B in x.axes else "n // steps // (heads // own_heads)",
            head="own_h" if H in x.axes else "n // steps % heads",
            place=place.rstrip("\n"),
            rows=_indented([*self.row_lines, *(template.RANDOM if self.random else [])], 2),
            columns=_indented(self.column_lines, 2),
            body=_indented(body, 2),
            derivative=self._by(n, x),
            store=DENSE_STORE if dense else DIAGONAL_STORE,
        )

    # -- signatures ----------------------------------------------------------------------------------------------

    def _options(self, lists: bool = True) -> str:
        free = [*self.scalars, *(["list_b", "list_h"] if self.listed and lists else [])]
        free += ["stream"] if self.random else []
        return f"(do_not_specialize={free!r})" if free else ""

    def _signature(
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
            *_constexprs([*constants, *(["LISTED", "PARTS_M", "PARTS_N"] if lists else [])]),
        ]
        return wrapped(f"def {name}", arguments, ":")


def _constexprs(names: Sequence[str]) -> list[str]:
    return [f"{name}: tl.constexpr" for name in names]


def _indented(lines: Sequence[str], depth: int = 1) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)
