"""From saved tensors to the launches of a generated backward: dq and delta first, dk and dv, then what is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from xfcompile.kernels.attention import (
    backward_loads,
    dead_rows,
    fit,
    launch_hopper_backward,
    programs,
    reference,
    template,
)
from xfcompile.kernels.attention.arguments import random_of
from xfcompile.kernels.attention.backward_call import Call
from xfcompile.kernels.attention.backward_layout import Gradients, Layout, Needs, layout_of, outputs, prepare
from xfcompile.kernels.attention.gradient import gradients
from xfcompile.kernels.attention.repeat import aligned
from xfcompile.kernels.registration import Site

log = logging.getLogger(__name__)

DEFINITION = "its gradients are computed by their definition, in plain PyTorch"


def run(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    forward: str,
    needs: Needs,
    tiles: Tensor | None = None,
    tiles_by_key: Tensor | None = None,
    block_m: int = 0,
    block_n: int = 0,
    seed: Tensor | None = None,
    stream: int = 0,
    site: Site | None = None,
) -> Gradients:
    """The gradients, by kernels: on a GPU, or interpreted on a CPU.

    dout, out [B, Hq, Lq, Dv]; lse [B, Hq, Lq]; all others as in the forward, with its lists of tiles, if it had any, by
    blocks of queries and by blocks of keys.
    """
    try:
        program = prepare(forward, needs.operands)
    except Exception as error:
        log.debug("making the text of a backward failed", exc_info=error)
        fit.give_way(fit.DoesNotCompile(f"{type(error).__name__}: {error}"), forward, DEFINITION)
        return by_definition(dout, q, k, v, operands, ints, floats, forward, needs, seed, stream)
    usual = site is not None and aligned(q, k, v, dout)
    layout: Layout | None = site.found if site is not None and usual else None
    if layout is None:
        layout = layout_of(program, needs, dout, q, k, v, out, lse, operands, tiles, tiles_by_key, block_m, block_n)
        if site is not None and usual:
            site.keep(layout, q.dtype)
    made = layout.outputs()
    if layout.empty:
        for x in (*made[:3], *made[3]):
            x.zero_()
        return made
    random = random_of(program.spec, seed, stream)
    call = Call(program, layout, needs, dout, q, k, v, out, lse, operands, ints, floats, random)
    call.listed(tiles, tiles_by_key, block_m, block_n)
    try:
        if layout.unavailable is not None:
            raise layout.unavailable.again()
        _fill(call, made)
    except fit.Unavailable as error:
        layout.unavailable = error.again()
        fit.give_way(error, forward, DEFINITION)
        return by_definition(dout, q, k, v, operands, ints, floats, forward, needs, seed, stream)
    return made


def _fill(call: Call, made: Gradients) -> None:
    """Launches the kernels, which write the gradients."""
    dq, dk, dv, doperands = made
    needs, layout = call.needs, call.layout
    loads = call.program.made.gradients.loads
    direct = {n: doperands[loads[n].load.operand].as_strided(*place) for n, place in layout.direct.items()}
    rows = {n: layout.row() for n in layout.rows}
    columns_ = {n: layout.column() for n in layout.columns}
    written = launch_hopper_backward.run(call, dq, dk, dv, direct)
    if written is None:
        written = layout.each_score
        call.clear([direct[n] for n in written])
        dq = dq if needs.q else call.q
        own = [call.q, call.k, call.v, call.out, call.dout, call.lse, call.pair, call.inverse, dq]
        of_scores = [direct[n] if n in written else call.q for n in layout.dense]
        call.launch("dq", [*own, *rows.values(), *of_scores], (dq, *of_scores))
        if needs.k or needs.v or columns_:
            outer = (dk if needs.k else call.k, dv if needs.v else call.v)
            own = [call.q, call.k, call.v, call.dout, call.pair, call.inverse, *outer]
            call.launch("dkdv", [*own, *columns_.values()], outer)
    if template.needs_mean(call.program.spec):
        dead_rows.add(call, made[0], dk, dv)
    for n in layout.added_to:
        doperands[n].zero_()
    for n, x in enumerate(loads):
        if n in written:
            continue
        if n in direct:
            write = backward_loads.launch_load if x.kind == "dense" else backward_loads.fold
            write(call, n, direct[n])
        else:
            backward_loads.add(call, x, backward_loads.of_load(call, n, x, rows, columns_), doperands)


def by_definition(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Sequence[Tensor],
    ints: Sequence[int],
    floats: Sequence[float],
    forward: str,
    needs: Needs,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Gradients:
    """The gradients as the definition has them, in plain PyTorch, in fp32 at least."""
    spec = programs.program(forward).spec
    found = gradients(spec, needs.operands)
    made = outputs(q, k, v, operands, needs)
    dtype = torch.promote_types(q.dtype, torch.float32)
    arguments = (dout, q, k, v, operands, ints, floats)
    *own, loads = reference.backward(spec, found, *arguments, dtype, seed=seed, stream=stream)
    for given, value in zip(made, own, strict=False):
        assert isinstance(given, Tensor)
        if given.numel():
            given.copy_(value)
    for doperand in made[3]:
        doperand.zero_()
    shape = (*q.shape[:3], k.shape[2])
    evaluate = reference.evaluator(spec, shape, operands, ints, floats, torch.float32, q.device)
    for x, value in zip(found.loads, loads, strict=True):
        backward_loads.deposit(made[3][x.load.operand], x.load, value, evaluate)
    return made
