"""The text of the kernel for Hopper, in Gluon: one warp loads tiles by TMA, warpgroups of 64 query rows compute.

Each warpgroup gives the tensor cores the scores of a tile and behind them the product of the tile before, and takes the
softmax of the former during the latter: the order of FlashAttention-3 (Shah et al., 2024). The site's own functions are
those of the Triton kernel, which Gluon compiles as its own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import sympy
import torch

from xfcompile.kernels import gluon
from xfcompile.kernels.attention import codegen, exponential, template
from xfcompile.kernels.attention.codegen import Pieces
from xfcompile.kernels.attention.forward_text import HELPERS
from xfcompile.kernels.attention.hopper_text import (
    ADD_COLUMNS,
    EXPONENT,
    FACTORS,
    FIXED,
    IN_TURN,
    KERNEL,
    MEAN,
    PLACES,
    PREAMBLE,
    QUEUE,
    TILES,
    TURNS,
    WITH_COLUMNS,
)  # fmt: skip
from xfcompile.kernels.attention.hopper_variant import (
    REFERENCE,
    START,
    Columns,
    Variant,
    columns_of,
    place_of,
    usual,
)
from xfcompile.kernels.attention.names import Form, Names
from xfcompile.kernels.lines import WIDTH, indented, returned, wrapped
from xfcompile.kernels.printing.printer import NAMES, Printer
from xfcompile.kernels.printing.rules import RULES
from xfcompile.kernels.printing.term import Term
from xfcompile.score import I, J, Load, S
from xfcompile.site import ScoreSpec

ROWS, KEYS = 128, 128
"""Query rows and keys of a tile in lists."""

HEAD_DIMS = (64, 128)
"""Columns of a tile; other head dims are padded by TMA, which reads zeros behind a tensor's end."""

BIAS_STAGES = 2
"""Tiles of a bias in shared memory."""


def why_not(spec: ScoreSpec, pieces: Pieces, dtype: torch.dtype, dq: int, dv: int) -> str | None:
    """Why this kernel is not the one for such a site; None if it is."""
    if dtype not in (torch.float16, torch.bfloat16):
        return "it multiplies numbers of 16 bits"
    if not (HEAD_DIMS[0] // 2 < min(dq, dv) and max(dq, dv) <= HEAD_DIMS[-1]) or columns(dq) != columns(dv):
        return "head dims"
    if dq % 8 or dv % 8:
        return "rows are not multiples of 16 bytes"
    if spec.dropout:
        return "it drops no weights out"
    if spec.full is not None:
        return "rows that score as low as masked keys take a second pass"
    if spec.band.lower is not None and spec.band.exact:
        return "a narrow band is visited in smaller tiles"
    if any(_compares(x) for x in spec.keep.atoms(sympy.core.relational.Relational)):
        return "documents are visited in smaller tiles"
    evens = set(pieces.evens)
    varying = [load for load in pieces.score.atoms(Load) if J in load.free_symbols and load not in evens]
    if varying and not usual(spec, pieces, dtype, columns(dq)).tiles:
        return "loads of each score are waited for"
    if not spec.score.has(S):
        return "scores without q·k"
    return None


def _compares(x: sympy.Basic) -> bool:
    """Whether what is loaded for a query is compared with what is for a key: of such masks many tiles are mixed, and
    more of them the larger they are. Documents took 0.33 ms in tiles of 64, and 0.49 in this kernel: an H100, D64, in
    examples/results/programs_h100_f342528.json ("kernel") and programs_h100_lists.json ("xformers")."""
    symbols = [load.free_symbols & {I, J} for load in x.atoms(Load)]
    return {I} in symbols and {J} in symbols


def columns(dim: int) -> int:
    return next(n for n in HEAD_DIMS if dim <= n)


BIAS = sympy.Symbol("bias", real=True)
"""A bias of each score."""


def module(spec: ScoreSpec, pieces: Pieces, variant: Variant) -> str:
    """The whole text, of a site that `why_not` has nothing against."""
    helpers = [HELPERS[name] for name in sorted(pieces.helpers)]
    functions = [*pieces.functions, *_functions(spec, pieces, variant)]
    kernel = _kernel(spec, pieces, variant)
    parts = [
        PREAMBLE.format(meaning=template.meaning(spec), imports=gluon.IMPORTS),
        *helpers,
        *functions,
        *([exponential.text(variant.polynomials, variant.bounded)] if variant.polynomials else []),
        FIXED,
        kernel,
    ]
    if template.needs_mean(spec):
        parts.append(MEAN)
    return "\n\n".join(parts)


def _functions(spec: ScoreSpec, pieces: Pieces, variant: Variant) -> list[str]:
    """Those of a variant: a tile of scores with its bias, as the program has it, or what goes by a key's place."""
    names = pieces.names
    rows = {x: Term(f"row{n}", "float") for n, x in enumerate(codegen.row_loads(pieces.score, spec.keep))}
    scope = {**NAMES, **{x: x.name for x in (*spec.scalars, codegen.FIRST, codegen.UNIT, START, BIAS)}}

    def function(name: str, arguments: Sequence[str], value: sympy.Expr) -> str:
        printer = Printer(RULES, spec.operands, scope, rows)
        text = printer.float(value).text
        lines = "".join(f"    {line}\n" for line in [*printer.lines, *returned(text)])
        signature = wrapped(f"def {name}", [*arguments, *names.inside, *names.flag_parameters], ":")
        return f"@triton.jit\n{signature}\n{lines}"

    if variant.tiles:
        return [function("biased", ["s", "bias", "b", "h", "i", "j"], pieces.score.xreplace({_tile_load(spec): BIAS}))]
    if variant.columns:
        found = _columns(spec, pieces)
        return [
            function("column_factor", ["start", "b", "h"], found.factor),
            function("column_shift", ["start", "b", "h"], codegen.times(codegen.UNIT, found.shift)),
        ]
    return []


def _tile_load(spec: ScoreSpec) -> Load:
    (load,) = (load for load in spec.score.atoms(Load) if J in load.free_symbols)
    assert isinstance(load, Load)
    return load


def _columns(spec: ScoreSpec, pieces: Pieces) -> Columns:
    found = columns_of(spec, pieces.score)
    assert found is not None
    return found


def _kernel(spec: ScoreSpec, pieces: Pieces, variant: Variant) -> str:
    names, forms = pieces.names, pieces.forms
    listed = ["list_ptr", "list_b", "list_h"] if names.listed else []
    own = [*names.outside, *listed]
    flags = names.flags
    tiling = ["n", "masked", "evens_at", "x0", "x1", "x2"]
    barriers = ["q_full", "q_empty", "full", "empty"]
    smem = ["q_smem", "k_smem", "v_smem"]
    sizes = ["blocks", "heads", "lq", "lk", "total"]
    constants = ["ROWS", "KEYS", "STAGES"]
    layouts = ["S_MMA", "O_MMA"]
    where = ["b", "h", "i", "offs_n", "start", "lk"]
    more = ["EVEN"] if names.evens else []
    turns = ["turns"] if variant.turns else []
    queue = ["queue"] if variant.queued else []
    counter = ["counter_ptr"] if variant.queued else []
    places = ["places"] if variant.columns else []
    memory = ["bias_smem", "bias_full", "bias_empty"] if variant.tiles else []
    bias_desc, bias = (["bias_desc"], ["bias"]) if variant.tiles else ([], [])
    early = spec.keep.has(Load)
    kept = ["kept"] if early else []

    def define(name: str, arguments: Sequence[str], constant: Sequence[str] = ()) -> str:
        return wrapped(f"def {name}", [*arguments, *(f"{x}: gl.constexpr" for x in constant)], ":")

    def call(name: str, arguments: Sequence[str], depth: int) -> str:
        text = wrapped(name, arguments)
        return textwrap.indent(text, " " * (4 * depth + 4)).strip()

    bounds = ["b", "h", "block", "lq", "lk", *names.scalars, *listed]
    tile = ["t", *tiling, *listed[:1]]
    exponent = ["exponent"] if variant.columns else []
    softmax = ["s", "m", *where, *names.inside, *names.evens, *bias, *kept, *exponent]
    advance = [
        "t", "step", "p", "acc", "alpha", "m", "l", "q", *smem[1:], "full", "empty", *tiling, "b", "h", "i", "offs_n",
        "lk", *names.inside, *listed[:1], *turns, *(["factors", *exponent, *places] if places else []), *memory,
        *(["bias_step"] if memory else []), *(["w"] if turns or memory else []),
    ]  # fmt: skip
    if "first" not in advance:
        advance.append("first")
    consume = [*smem, *barriers, *turns, *queue, *places, *memory, *sizes, "out_ptr", "lse_ptr", *own]
    described = ["q_desc", "k_desc", "v_desc", *bias_desc]
    produce = [*described, *smem, *barriers, *queue, *memory, *sizes, "group", *counter, *names.scalars, *listed]
    pointers = [*described, "out_ptr", "lse_ptr", *counter, *names.pointers, *listed[:1]]
    kernel = [*pointers, *sizes, "group", *names.strides, *names.scalars, *listed[1:]]

    def softmaxed(given: dict[str, str], masked: str, even: str, depth: int) -> str:
        return call("softmax", [*(given.get(x, x) for x in softmax), *flags, masked, *([even] if more else [])], depth)

    def loop(start: str, end: str, masked: bool, even: bool) -> str:
        given = ["step - turn + 1" if x == "bias_step" else x for x in advance]
        kinds = [str(masked), *([str(even)] if more else [])]
        advanced = call("advance", [*given, *constants, *flags, *layouts, *kinds], 0)
        return f"for t in range({start}, {end}):\n    p, acc, alpha, m, l = {advanced}\n    step += 1"

    evens = names.evens
    ahead: list[str] = []
    if evens:
        ahead = [f"{name} = 0.0" for name in evens]
        values = zip(evens, forms.even_values, strict=True)
        read = [*forms.even_lines, *(f"{name} = {value}" for name, value in values)]
        ahead = ["if EVEN:", "    ahead = start", *(f"    {x}" for x in read), "else:", *(f"    {x}" for x in ahead)]
    sink, initial = "", 'gl.full([M], float("-inf"), gl.float32, S_ROW)'
    if spec.sink is not None:
        arguments = ", ".join(["b", "h", "row", *names.outside, *flags])
        initial = f"sink({arguments}) + gl.zeros([M], gl.float32, S_ROW)"
        sink = "\n".join(
            [
                "# The sink is there before any key: it has weight but no value.",
                f"sink_ = sink({arguments})",
                template.POWER,
                'l += tl.where(m == float("-inf"), 0.0, tl.exp2((sink_ - m) * POWER))',
            ]
        )
    dead = "l = tl.where(l == 0.0, 1.0, l)" if spec.dead == "zero" and spec.sink is None else ""
    if template.needs_mean(spec):
        dead = "l = tl.where(l == 0.0, 1.0, l)  # such rows are filled later"
    loops = [loop("1", "masked", True, False), loop("gl.maximum(masked, 1)", "evens_at", False, False)]
    if evens:
        loops.append(loop("gl.maximum(evens_at, 1)", "n", False, True))
    given = [*consume, *constants, *flags, "DV", "HEADS_FIRST"]
    groups = variant.warpgroups
    texts = {
        "locate": define("locate", ["work", "blocks", "heads", "total"]),
        "place": _place(spec, names),
        "bounds": define("bounds", bounds, ["ROWS", "KEYS"]),
        "bounds_body": _bounds(spec, names),
        "tile": define("tile", tile, ["KEYS"]),
        "tile_body": _tile(names),
        "produce": define("produce", produce, constants),
        "call_bounds": call("bounds", [*bounds, "ROWS", "KEYS"], 2),
        "call_tile_produced": call("tile", ["gl.minimum(t, n - 1)", *tile[1:], "KEYS"], 3),
        "call_tile_first": call("tile", ["0", *tile[1:], "KEYS"], 2),
        "softmax": define("softmax", softmax, [*flags, "MASKED", *more]),
        "softmax_body": _softmax(spec, pieces, variant),
        "power": template.POWER,
        "alpha": "alpha = tl.exp2((m - m_safe) * POWER)",
        "advance": define("advance", advance, [*constants, *flags, *layouts, "MASKED", *more]),
        "call_tile": call("tile", [*tile, "KEYS"], 1),
        "ahead": "\n".join(ahead),
        "call_softmax": softmaxed({"kept": "None"}, "MASKED", "EVEN", 1),
        "rescale": "acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_MMA))[:, None]",
        "rescale_sum": "l = l * gl.convert_layout(alpha, gl.SliceLayout(1, l.type.layout))[:, None]",
        "consume": define("consume", ["w", *consume], [*constants, *flags, "DV", "HEADS_FIRST"]),
        "rows": "\n".join(pieces.row_lines),
        "initial": initial,
        "call_softmax_first": softmaxed(dict.fromkeys(evens, "0.0"), "True", "False", 2),
        "loops": "\n".join(loops),
        "sink": sink,
        "lse": template.lse(forms, names),
        "dead": dead,
        "unspecialized": repr([*sizes, "group", *names.scalars, *listed[1:]]),
        "kernel": define("attention_forward", kernel, [*constants, *flags, "DV", "HEADS_FIRST", "REGISTERS"]),
        "consumers": "\n".join(_partition("consume", [str(w), *given]) for w in range(groups)),
        "producer": _partition("produce", [*produce, *constants]),
        "groups": str(groups),
        "warps": repr([4] * (groups - 1) + [1]),
        "registers": f"[{', '.join(['REGISTERS'] * (groups - 1))}, 24]",
        "leave": "mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)",
    }
    # What only some have.
    texts |= dict.fromkeys(("leave_first", "take_turn", "give_turn", "turns", "turns_init"), "")
    texts |= dict.fromkeys(("factors", "places", "add_columns", "kept"), "")
    texts |= dict.fromkeys(("produce_bias", "read_bias", "read_bias_first", "bias_memory", "bias_init"), "")
    texts |= dict.fromkeys(QUEUE, "")
    texts |= {name: text.format(groups=groups) for name, text in QUEUE.items()} if variant.queued else IN_TURN
    if early:
        site = ", ".join(["b", "h", "i", "gl.minimum(start + offs_n, lk - 1)", *names.inside, *flags])
        texts["kept"] = f"kept = keep({site}) & (start + offs_n < lk)  # which nothing has to wait for"
    if variant.turns:
        texts |= {name: text.format(groups=groups) for name, text in TURNS.items()}
        texts |= {"leave_first": texts["leave"], "leave": ""}
    if variant.columns:
        factors = FACTORS.format(arguments=", ".join(["0", "b", "h", *names.inside, *flags]))
        scale = _columns(spec, pieces).scale
        nearest = 2.0 ** math.ceil(math.log2(scale * template.LOG2E))
        of_scores = EXPONENT.format(scale=repr(scale), power_of_two=nearest, log2e=template.LOG2E)
        texts["factors"] = f"{factors}\n{of_scores}"
        texts |= {"places": PLACES, "add_columns": ADD_COLUMNS}
    if variant.bounded:
        texts |= {"initial": f"gl.full([M], {REFERENCE}, gl.float32, S_ROW)", "alpha": "alpha = m  # not used"}
        texts |= {"rescale": "", "rescale_sum": ""}
    if variant.tiles:
        b, h, *_ = place_of(_tile_load(spec))
        about = {"stages": BIAS_STAGES, "groups": groups, "number": BIAS_STAGES * groups, "b": b, "h": h}
        texts |= {name: text.format(**about) for name, text in TILES.items()}
        texts["read_bias_first"] = f"bias_step = step - turn\n{texts['read_bias']}"
    return _filled(KERNEL, texts)


def _filled(text: str, parts: Mapping[str, str]) -> str:
    """A template with its parts. One that has a line for itself is indented as that is; an empty one takes it away."""
    lines = []
    for line in text.split("\n"):
        name = line.strip()[1:-1]
        if line.strip() != f"{{{name}}}" or name not in parts:
            lines.append(line.format(**parts))
        elif parts[name]:
            lines.append(textwrap.indent(parts[name], line[: line.index("{")]))
    return "\n".join(lines)


def _place(spec: ScoreSpec, names: Names) -> str:
    lines = ["b = work // blocks // heads", "h = work // blocks % heads"]
    if template.batches_share(spec):
        # All batches load the same tile of the bias: one after the other.
        batch = "batch = total // (blocks * heads)"
        lines = [batch, "b = work % batch", "work = work // batch", "h = work // blocks"]
    if spec.keep != sympy.true and (names.listed or spec.band.upper is not None):
        return "\n".join([*lines, "block = blocks - 1 - work % blocks  # the last rows see most keys: start with them"])
    return "\n".join([*lines, "block = work % blocks"])


def _bounds(spec: ScoreSpec, names: Names) -> str:
    if names.listed:
        return "\n".join(
            [
                "tiles = (lk + KEYS - 1) // KEYS",
                "rows = (lq + ROWS - 1) // ROWS",
                "x0 = ((b * list_b + h * list_h) * rows + block).to(gl.int64) * (tiles + 3)",
                "x1 = tiles",
                # Without loads that may be even all whole tiles count as even, and are as others are.
                "evens = gl.load(list_ptr + x0)" if names.evens else "evens = 0",
                "wholes = gl.load(list_ptr + x0 + 1)",
                "masked = gl.load(list_ptr + x0 + 2)",
                "x2 = wholes + masked",
                "# A block without tiles visits one, all of which is masked.",
                "masked = gl.where(x2 == 0, 1, masked)",
                "n = gl.maximum(x2, 1)",
                "evens_at = n - evens",
            ]
        )

    def bound(side: str, row: str) -> str:
        return f"clamp({side}({', '.join([row, *names.scalars])}), lk)"

    lines = ["x2 = 0", "high = (lk + KEYS - 1) // KEYS", "full = lk // KEYS"]
    if spec.keep != sympy.true:
        if spec.band.upper is not None:
            lines += [
                "last = gl.minimum(first + ROWS, lq) - 1",
                f"high = ({bound('upper', 'last')} + KEYS - 1) // KEYS",
                f"full = gl.minimum({bound('upper', 'first')} // KEYS, high)",
            ]
        if not spec.band.exact:
            lines.append("full = 0")
    return "\n".join(
        [
            *lines,
            "# A block without tiles visits one, all of which is masked.",
            "x1 = gl.maximum(high, 1)",
            "x0 = 0",
            "n = x1",
            "masked = x1 - full",
            "evens_at = n",
        ]
    )


def _tile(names: Names) -> str:
    """Masked tiles come first."""
    if names.listed:
        return "\n".join(
            [
                "# Of a list the first are even, then come whole ones; the masked ones stand at the end, backwards.",
                "front = gl.where(t < evens_at, n - evens_at + t - masked, t - evens_at)",
                "at = gl.where(t < masked, 2 + x1 - t, 3 + front)",
                "start = gl.load(list_ptr + x0 + at, mask=x2 > 0, other=0) * KEYS",
            ]
        )
    return "start = (n - 1 - t) * KEYS"


def _softmax(spec: ScoreSpec, pieces: Pieces, variant: Variant) -> str:
    names, forms = pieces.names, pieces.forms
    site = ", ".join(["b", "h", "i", "j", *names.inside, *names.flags])
    highest = "gl.max(s, 1)"
    lines = ["column = start + offs_n", "j = column", "if MASKED:", "    j = gl.minimum(j, lk - 1)"]
    seen = "column < lk" if spec.keep == sympy.true else f"keep({site}) & (column < lk)"
    exponent = f"({forms.usual.scale!r} * UNIT * POWER)"
    unseen = 'float("-inf")'
    if variant.bounded and variant.polynomials:  # its power is 0 too
        unseen = f"{exponential.LEAST + REFERENCE} / {exponent}"
    masks = ["if MASKED:", f"    s = gl.where({seen}, s, {unseen})"]
    if spec.keep.has(Load):
        masks = [
            "if MASKED:",
            "    if kept is None:",
            f"        kept = {seen}",
            f"    s = gl.where(kept, s, {unseen})",
        ]
    exp2 = "exp2" if variant.polynomials else "tl.exp2"
    scores = template.scores(spec, forms.usual, site)
    weights = template.softmax(forms.usual, site, highest=highest, exp2=exp2)
    if variant.columns:
        shift = ", ".join(["start", "b", "h", *names.inside, *names.flags])
        scale = repr(_columns(spec, pieces).scale)
        scores, weights = [], WITH_COLUMNS.format(shift=shift, scale=scale, exp2=exp2).split("\n")
    if variant.bounded:
        weights = ["m_new = m", f"p = {exp2}(s * {exponent} - {REFERENCE})"]
    if variant.tiles:
        # Scores may be far from 0: their difference is taken first, and is 0 where they are equal.
        weights = template.softmax(Form(), site, highest=highest, exp2=exp2)
        scores = ["bias = bias.to(tl.float32)", f"s = biased(s, bias, {site})"]
    usual = "\n".join([*scores, *masks, *weights])
    if forms.even is None:
        return "\n".join([*lines, usual])
    with_evens = ", ".join([site, *names.evens])
    even = "\n".join(
        [
            *template.scores(spec, forms.even, with_evens, "even_"),
            *template.softmax(forms.even, with_evens, "even_", highest=highest, exp2=exp2),
        ]
    )
    return "\n".join([*lines, "if EVEN:", indented(even), "else:", indented(usual)])


def _partition(function: str, arguments: Sequence[str]) -> str:
    """What a part of a program's warps runs."""
    listed = textwrap.fill(", ".join(arguments), WIDTH - 12, break_long_words=False)
    return f"({function}, (\n{indented(listed)},\n)),"
