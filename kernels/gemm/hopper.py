"""The text of a product of matrices for Hopper, in Gluon: one warp loads tiles by TMA, warpgroups of 64 rows multiply.

Programs stay and take tile after tile: while sums become results, the next tile is loaded. Two products of one x stand
beside each other in a warpgroup's sums, so that one instruction multiplies for both and a thread holds both sums of an
element. Results leave through shared memory, by TMA.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from xfcompile.activation import GATE, KEEP, UP, X, separate, tensor, vector, with_distributions
from xfcompile.kernels import gluon, pointwise
from xfcompile.kernels.gemm.hopper_text import DROPOUT, FETCH, FIXED, HALVES, HEAD, KERNEL
from xfcompile.kernels.lines import wrapped


@dataclass(frozen=True)
class Epilogue:
    """What is stored: a formula of `sums`, one element of each product with its bias, and of what stands at its place
    in vectors along the last axis and in tensors of the result's shape.

    saves: each of `sums` is stored too. drops: by dropout, of a gated
    MLP the formula's value, otherwise what its `KEEP` says.
    """

    value: sympy.Expr
    sums: tuple[sympy.Symbol, ...]
    vectors: int = 0
    tensors: int = 0
    saves: bool = False
    drops: bool = False

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.sums]

    @property
    def gated(self) -> bool:
        return self.sums == (GATE, UP)

    @property
    def stores(self) -> int:
        """Matrices that are stored."""
        return 1 + len(self.sums) * self.saves


def gated(formula: sympy.Expr, *, saves: bool = False, drops: bool = False) -> Epilogue:
    """Of a gated MLP's `GATE` and `UP`."""
    return Epilogue(formula, (GATE, UP), saves=saves, drops=drops)


def single(value: sympy.Expr, vectors: int = 0, tensors: int = 0, *, saves: bool = False) -> Epilogue:
    """Of one product's `X`."""
    return Epilogue(value, (X,), vectors, tensors, saves, KEEP in value.free_symbols)


def why_not(epilogue: Epilogue) -> str | None:
    """Why a formula is not computed by this kernel; None if it is."""
    known = {*epilogue.sums, *map(vector, range(epilogue.vectors)), *map(tensor, range(epilogue.tensors))}
    if epilogue.tensors > 1 or (epilogue.tensors and epilogue.saves):
        return "one piece of shared memory for what is read and stored"
    if epilogue.value.free_symbols - known - {KEEP}:
        return "a formula of what it does not know"
    return None


DRAWING = 40
"""Registers of a thread that draws random numbers, and of those that load, which are in the same warpgroup."""

CONSTANTS = ["STAGES", "PART", "BUFFERS", "GROUP", "SKEW", "REGISTERS"]


def flags(epilogue: Epilogue) -> list[str]:
    """Compile-time arguments of a site: whether each product has a bias, and whether the weight is [K, N]."""
    return [*(f"{name.upper()}_BIAS" for name in epilogue.names), "ACROSS"]


def module(epilogue: Epilogue) -> str:
    """The whole text, of an epilogue that `why_not` has nothing against."""
    value, helpers = value_text(epilogue)
    parts = [
        HEAD.format(value=epilogue.value, imports=gluon.IMPORTS),
        HALVES,
        *pointwise.functions(helpers),
        value,
        FIXED,
        *([FETCH] if epilogue.tensors else []),
        *([DROPOUT] if epilogue.drops else []),
        _kernel(epilogue),
    ]
    return "\n\n".join(part.rstrip("\n") + "\n" for part in parts)


def _read(epilogue: Epilogue) -> list[str]:
    """What `value` takes."""
    vectors, tensors = map(vector, range(epilogue.vectors)), map(tensor, range(epilogue.tensors))
    keep = [KEEP] if epilogue.drops and not epilogue.gated else []
    return [s.name for s in (*epilogue.sums, *keep, *vectors, *tensors)]


def value_text(epilogue: Epilogue) -> tuple[str, set[str]]:
    """The function that computes a formula from sums, and the helpers that it calls."""
    names = {s: s.name for s in epilogue.value.free_symbols}
    formula = with_distributions(epilogue.value)
    apart = separate(formula) if epilogue.gated else None
    if apart is None or apart[1] == 1:
        lines, helpers = pointwise.lines({"out": formula}, names)
    else:
        # What is of gate alone first: gate * sigmoid(gate) is 0 where gate * up may be infinite.
        lines, helpers = pointwise.lines({"of_gate": apart[0], "of_up": apart[1]}, names)
        lines.append("out = of_gate * of_up")
    parameters = [*_read(epilogue), "FAST: tl.constexpr"]
    body = textwrap.indent("\n".join([*lines, "return out"]), "    ")
    return "@triton.jit\n" + wrapped("def value", parameters, ":") + "\n" + body + "\n", helpers


def _kernel(epilogue: Epilogue) -> str:
    names = epilogue.names
    weights = ["weight_desc"] if names == ["x"] else [f"{name}_desc" for name in names]
    biases = [f"{name}_bias_ptr" for name in names]
    others = [f"v{n}_ptr" for n in range(epilogue.vectors)]
    fetched = ["r0_desc"] if epilogue.tensors else []
    sizes = ["rows", "features"]
    saved = [f"{name}_out_desc" for name in names] if epilogue.saves else []
    dropout = ["threshold", "scale", "stream"] if epilogue.drops else []
    scaled = ["scale"] if epilogue.drops else []
    given = ["out_desc", *saved, *fetched, *biases, *others, *sizes, *scaled]
    tiling = ["steps", "tiles_m", "tiles_n"]
    *own, across = flags(epilogue)
    smem = ["x_smem", "w_smem"]
    finish_constants = ["w", "NUMBER", "PART", "PARTS", "BUFFERS", *own]
    barriers = ["r_full"] if epilogue.tensors else []
    turn = ["turn"] if epilogue.tensors else []
    bits = ["bits"] if epilogue.drops else []
    at = ["drawn"] if epilogue.drops else []
    handed = ["b_full", "b_empty"] if epilogue.drops else []
    finish = ["first_m", "first_n", "out_smem", *barriers, *turn, *bits, *at, *given]
    pointer = ["seed_ptr"] if epilogue.drops else []
    consume = [*smem, "out_smem", "full", "empty", "started", *barriers, *bits, *handed, *given, *tiling]
    produce = ["x_desc", *weights, *smem, "full", "empty", *tiling]
    produced = ["STAGES", "GROUP", across]
    consumed = [*(x for x in CONSTANTS if x != "REGISTERS"), across, *own]

    def constants(names: Sequence[str]) -> list[str]:
        return [f"{x}: gl.constexpr" for x in names]

    def define(name: str, arguments: Sequence[str], constant: Sequence[str] = ()) -> str:
        return wrapped(f"def {name}", [*arguments, *constants(constant)], ":")

    def call(name: str, arguments: Sequence[str], depth: int) -> str:
        return textwrap.indent(wrapped(name, arguments), " " * 4 * depth).strip()

    def part(side: str, first_n: str, number: str) -> str:
        moved = {"first_n": first_n, "NUMBER": number}
        sums = [f"{name}_{side}" for name in names]
        return call("finish", [*sums, *(moved.get(x, x) for x in (*finish, *finish_constants))], 2)

    def consumer(n: int) -> str:
        return _arguments([str(n), *consume, *consumed])

    save = [
        f"put({name}, {desc}, first_m, first_n, out_smem, w, {_number(epilogue, n)}, BUFFERS)"
        for n, (name, desc) in enumerate(zip(names, saved, strict=False))
    ]
    loads = []
    for name, bias, flag in zip(names, biases, own, strict=True):
        loads += [f"if {flag}:", f"    {name} = with_bias({name}, {bias}, columns, features)"]
    loads += save
    for n in range(epilogue.vectors):
        loads.append(f"v{n} = gl.load(v{n}_ptr + columns, mask=columns < features, other=0.0).to(gl.float32)[None, :]")
    fetch_first, fetch_next = [], []
    if epilogue.tensors:
        # A warpgroup fetches ahead as many blocks as it has buffers, the first while it multiplies.
        fetch_first = [
            "tma.store_wait(0)",
            "for n in gl.static_range(BUFFERS):",
            "    fetch(r0_desc, first_m, first_n + n * PART, out_smem, r_full, w * BUFFERS + n)",
        ]
        loads += [
            "at = w * BUFFERS + NUMBER % BUFFERS",
            "mbarrier.wait(r_full.index(at), turn + NUMBER // BUFFERS & 1)",
            "r0 = out_smem.index(at).load(LAYOUT).to(gl.float32)",
        ]
        fetch_next = [
            "if NUMBER + BUFFERS < PARTS:",
            "    tma.store_wait(0)",
            "    fetch(r0_desc, first_m, first_n + BUFFERS * N, out_smem, r_full, at)",
        ]
    drop = []
    if epilogue.drops:
        keep = "kept(bits.index(drawn + NUMBER), LAYOUT, N)"
        if epilogue.gated:
            drop = [f"out = gl.where({keep}, out * scale, 0.0)"]
        else:
            loads.append(f"keep = gl.where({keep}, scale, 0.0)")
    split = [f"{name}_left, {name}_right = halves({name})" for name in names]
    whole = {"NUMBER": "0", "PARTS": "BLOCK_N // PART"}
    finish_call = [*(whole.get(x, x) for x in (*finish, *finish_constants))]
    if len(names) == 1:
        finish_all = [call("finish", ["acc", *finish_call], 0)]
    else:
        finish_all = ["gate, up = halves(acc)", call("finish", [*names, *finish_call], 0)]
    if epilogue.tensors:
        finish_all.append("turn += BLOCK_N // PART // BUFFERS")
    if epilogue.drops:
        finish_all = [
            "mbarrier.wait(b_full.index(drawing % 2), drawing // 2 & 1)",
            "drawn = (drawing % 2 * CONSUMERS + w) * (BLOCK_N // PART)",
            *finish_all,
            "mbarrier.arrive(b_empty.index(drawing % 2), count=1)",
            "drawing += 1",
        ]
    drawers = ""
    if epilogue.drops:
        drawn = ["bits", "b_full", "b_empty", "features", "threshold", "stream", "seed_ptr", "tiles_m", "tiles_n"]
        block_n = f"WIDE // {len(names)}"
        drawers = f", (draw, (\n{_arguments([*drawn, block_n, 'PART', 'GROUP'])}\n        ))"
    r_barriers = [
        "r_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS * BUFFERS, 1], mbarrier.MBarrierLayout())",
        "for n in gl.static_range(CONSUMERS * BUFFERS):",
        "    mbarrier.init(r_full.index(n), count=1)",
    ] * epilogue.tensors
    b_barriers = [
        f"bits = gl.allocate_shared_memory(gl.int32, [2 * CONSUMERS * (WIDE // {len(names)} // PART), PART // 32, M],",
        "                                  gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))",
        "b_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())",
        "b_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())",
        "for n in gl.static_range(2):",
        "    mbarrier.init(b_full.index(n), count=1)",
        "    mbarrier.init(b_empty.index(n), count=CONSUMERS)",
    ] * epilogue.drops
    load_weights = [
        f"tma.async_copy_global_to_shared({w}, [tile_n * BLOCK_N, k * BLOCK_K], bar, weights.index({n}))"
        for n, w in enumerate(weights)
    ]
    pointers = ["x_desc", *weights, "out_desc", *saved, *fetched, *biases, *others, *pointer]
    return KERNEL.format(
        finish=define("finish", [*names, *finish], finish_constants),
        sum=names[0],
        split=_indented(split, 2),
        finish_left=part("left", "first_n", "2 * NUMBER"),
        finish_right=part("right", "first_n + N // 2", "2 * NUMBER + 1"),
        loads=_block(loads, 2),
        value=f"value({', '.join([*_read(epilogue), '2'])})",
        drop=_block(drop, 2),
        fetch_first=_block(fetch_first, 2),
        fetch_next=_block(fetch_next, 2),
        r_barriers=_block(r_barriers, 1),
        b_barriers=_block(b_barriers, 1),
        drawers=drawers,
        warps=[4, 1, 2] if epilogue.drops else [4, 1],
        registers=f"[REGISTERS, {DRAWING}, {DRAWING}]" if epilogue.drops else "[REGISTERS, 24]",
        warps_of_others=[1, 2] if epilogue.drops else [1],
        registers_of_others=f"[{DRAWING}, {DRAWING}]" if epilogue.drops else "[24]",
        number=_number(epilogue, epilogue.stores - 1),
        counters=_block(["drawing = 0"] * epilogue.drops + ["turn = 0"] * epilogue.tensors, 1),
        products=len(names),
        produce=define("produce", produce, produced),
        load_weights=_indented(load_weights, 4),
        consume=define("consume", ["w: gl.constexpr", *consume], consumed),
        finish_all=_indented(finish_all, 2),
        unspecialized=repr([*sizes, *tiling, *dropout]),
        kernel=define("gemm", [*pointers, *sizes, *tiling, *dropout], [*CONSTANTS, *own, across]),
        weight=weights[0],
        consumer_0=consumer(0),
        consumer_1=consumer(1),
        producer=_arguments([*produce, *produced]),
    )


def _number(epilogue: Epilogue, n: int) -> str:
    """The place of the n-th block that a part stores, among all of a tile's."""
    return "NUMBER" if epilogue.stores == 1 else f"{epilogue.stores} * NUMBER + {n}"


def _indented(lines: Sequence[str], depth: int) -> str:
    return textwrap.indent("\n".join(lines), "    " * depth)


def _block(lines: Sequence[str], depth: int) -> str:
    """Whole lines, or none."""
    return "".join(f"{line}\n" for line in _indented(lines, depth).splitlines())


def _arguments(names: Sequence[str]) -> str:
    return textwrap.fill(
        ", ".join(names), 120, initial_indent=" " * 12, subsequent_indent=" " * 12, break_long_words=False
    )
