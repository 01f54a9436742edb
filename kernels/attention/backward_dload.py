"""The text of the kernel for the gradient by what a score loads."""

from __future__ import annotations

from xfcompile.kernels.attention import template
from xfcompile.kernels.attention.backward_text import (
    DENSE_PLACE,
    DENSE_RANGE,
    DENSE_STORE,
    DIAGONAL_PLACE,
    DIAGONAL_RANGE,
    DIAGONAL_STORE,
    LOAD_KERNEL,
    SCORES,
)
from xfcompile.kernels.attention.backward_writer import CONSTANTS, Writer, indented
from xfcompile.kernels.attention.gradient import LoadGradient
from xfcompile.score import B, H

WHAT = {
    True: "of a tile of scores, or of a part of its batches and heads",
    False: "of the tiles along one diagonal, whose scores are as far apart",
}
"""Of which scores a program adds gradients up, by whether they are a dense load's."""


def dload(w: Writer, n: int, x: LoadGradient) -> str:
    spec = w.spec
    dense = x.kind == "dense"
    skip: list[str] = []
    for side, bound, test in (
        ("upper", spec.band.upper, "first_tile * BLOCK_N >= {}(tl.minimum((first_row + 1) * BLOCK_M, lq) - 1{})"),
        ("lower", spec.band.lower, "(first_tile + 1) * BLOCK_N <= {}(first_row * BLOCK_M{})"),
    ):
        if bound is not None:
            scalars = "".join(f", {name}" for name in w.scalars)
            skip += [f"if {test.format(side, scalars)}:", "    steps = 0  # no score of the tile is kept"]
    body = [
        SCORES.format("q, tl.trans(k)", "[M, N]"),
        "dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)",
        *w.scores(flags=("True", "EDGE_N")),
        *w.dropped("dp"),
        "dx = p * (dp - delta[:, None])",
    ]
    tensors = ["q_ptr", "k_ptr", "v_ptr", "dout_ptr", "pair_ptr", "inverse_ptr", "dload_ptr"]
    axes = [("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("g", "bhmd")]
    if dense:
        axes.append(("l", "pbhmn"))
    numbers = ["batch", "parts"] if dense else ["batch"]
    place = DENSE_PLACE.format(skip=indented(skip)) if dense else DIAGONAL_PLACE
    return LOAD_KERNEL.format(
        options=w.options(lists=False),
        signature=w.signature(
            f"attention_backward_load{n}",
            tensors,
            axes,
            [*CONSTANTS, *w.flags],
            numbers=numbers,
            lists=False,
        ),
        load=x.load,
        what=WHAT[dense],
        batches="batch" if B in x.axes else "1",
        own_heads="heads" if H in x.axes else "1",
        batch="own_b" if B in x.axes else "n // steps // (heads // own_heads)",
        head="own_h" if H in x.axes else "n // steps % heads",
        place=place.rstrip("\n"),
        range=DENSE_RANGE if dense else DIAGONAL_RANGE,
        rows=indented([*w.row_lines, *(template.RANDOM if w.random else [])], 2),
        columns=indented(w.column_lines, 2),
        body=indented(body, 2),
        derivative=w.by(n, x),
        store=DENSE_STORE if dense else DIAGONAL_STORE,
    )
