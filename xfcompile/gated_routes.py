"""Chooses how a gated MLP runs: a dual GEMM, a packed product and a fused activation, or left to Inductor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import sympy

from xfcompile.evaluate import Unsupported
from xfcompile.family import Route
from xfcompile.kernels import philox
from xfcompile.kernels.gemm import tiles
from xfcompile.measured import GFX942, SM_80, SM_90, SM_100, Fact, Measured, hardware_of
from xfcompile.site import GatedMLPSite

RECOMPUTE = "_recompute"

ROUTES = ("triton", "cublas", f"triton{RECOMPUTE}", f"cublas{RECOMPUTE}", "inductor")
"""Those that recompute keep nothing of a gated MLP but its input, and project again in the backward: two more products
beside nine, for the memory of both projections. They are for who asks for them."""

TIMED = ("triton", "cublas", "inductor")
"""Those that tuning compares: it asks for speed alone."""

UNKNOWN = "the number of features is not known at compile time"

CHANGING = "the number of rows may change"

UNMEASURED = "not measured to be faster than Inductor at this size"

_MEASURED = Measured(
    "python -m xfcompile bench gated-mlp",
    "2026-11-25",
    "H200, torch 2.11, triton 3.6",
    "examples/results/gated_h200.json",
)

_STREAMED = Measured(
    "examples/bench_gated_few.py", "2026-11-29", "H200, torch 2.11, triton 3.6", "examples/results/gated_few_h200.json"
)

_TRAINED = Measured(
    "python -m xfcompile bench models",
    "2026-11-29",
    "H200, torch 2.11, triton 3.6",
    "examples/benchmarks/models_h200.json",
)
"""A Llama's step is as fast as with its MLPs by Inductor (1.40 and 1.41 times Inductor's speed) and keeps 5.7 GB, not
6.7: of an MLP's tensors two, not three. MLPs alone were not measured to be faster."""

_HOPPER: Mapping[tuple[str, str, str], Fact[str]] = {
    ("inference", "separate", "one row"): Fact("triton", _STREAMED),
    ("inference", "separate", "few rows"): Fact("triton", _STREAMED),
    ("inference", "separate", "dozens of rows"): Fact("triton", _STREAMED),
    ("inference", "separate", "some rows"): Fact("inductor", _MEASURED),
    ("inference", "separate", "many rows"): Fact("triton", tiles.MEASURED),
    ("inference", "packed", "one row"): Fact("triton", _STREAMED),
    ("inference", "packed", "few rows"): Fact("triton", _STREAMED),
    ("inference", "packed", "dozens of rows"): Fact("triton", _STREAMED),
    ("inference", "packed", "some rows"): Fact("inductor", _MEASURED),
    ("inference", "packed", "many rows"): Fact("triton", tiles.MEASURED),
    ("training", "separate", "some rows"): Fact("inductor", _MEASURED),
    ("training", "separate", "many rows"): Fact("triton", _TRAINED),
    ("training", "packed", "some rows"): Fact("inductor", _MEASURED),
    ("training", "packed", "many rows"): Fact("inductor", _MEASURED),
}

USUAL: dict[tuple[str, str, str, str], Fact[str]] = {
    **{(SM_90, *place): fact for place, fact in _HOPPER.items()},
    **{(kind, *place): Fact("inductor") for kind in (SM_80, SM_100, GFX942) for place in _HOPPER},
}
"""The usual route of 16-bit numbers: by hardware, what is differentiated, how many weights there are, and the class of
the number of rows. What is not in the table is left to Inductor. `python -m xfcompile bench gated-mlp` measures all of
its cells."""

CLASSES = ((1, "one row"), (16, "few rows"), (64, "dozens of rows"), (1023, "some rows"))
"""Up to how many rows; "many rows" beyond. 16 rows are one tile of tensor cores, and dozens, too, cost little more than
reading the weights; from about 1024 rows on the products take longer than that on an H200, of 4096 by 11008 and
larger."""


def rows_class(rows: sympy.Expr) -> str:
    """The class of a number of rows; of one that is not known at compile time, one that is not in the table."""
    if not rows.is_Integer:
        return "any number of rows"
    return next((name for most, name in CLASSES if rows <= most), "many rows")


def usual(site: GatedMLPSite, training: bool, rows: str) -> str:
    """The usual route on GPUs of a class of rows."""
    if site.experts is not None or site.dtype.itemsize != 2:
        return "inductor"
    weights = "separate" if site.layout == "separate" else "packed"
    place = (hardware_of(site.root.meta.device), "training" if training else "inference", weights, rows)
    return USUAL.get(place, Fact("inductor")).value


def most_rows(site: GatedMLPSite, training: bool) -> int:
    """Up to so many rows a site usually runs as with a few; 0 where that is by Inductor.

    A number that may change is never 1: torch.compile compiles for that alone.
    """
    few, *_ = routes = [(most, usual(site, training, name)) for most, name in CLASSES[1:]]
    alike = itertools.takewhile(lambda route: route[1] == few[1], routes)
    return 0 if few[1] == "inductor" else max(most for most, _ in alike)


def choose(site: GatedMLPSite, *, training: bool, forced: str | None, most: int | None = None) -> Route:
    """The route of a site; `forced` is what the user asks for. most: rows, where it is known that there are no more.

    The reason `CHANGING` says that few rows would have another one.
    """
    if forced == "inductor":
        return Route("inductor", "asked for")
    device = site.root.meta.device
    if forced is None and device.type != "cuda":
        return Route("inductor", f"left to Inductor: there is no kernel that is faster on {device.type}")
    rows = site.rows if most is None else sympy.Integer(most)
    few = 0 if forced or rows.is_Integer else most_rows(site, training)
    name = forced or usual(site, training, rows_class(sympy.Integer(few) if few else rows))
    if name == "inductor":
        return Route("inductor", f"left to Inductor: {UNMEASURED}")
    reason = _why_not(site, name)
    if reason is not None:
        return Route("inductor", reason)
    if forced is None and name == "triton" and hardware_of(device) == SM_90:
        reason = _why_not_for_hopper(site, few or rows, training)
        if reason is not None:
            return Route("inductor", f"left to Inductor: {reason}")
    if few:
        return Route("inductor", CHANGING)
    return Route(name, "asked for" if forced else None)


def _why_not(site: GatedMLPSite, name: str) -> str | None:
    try:
        from xfcompile.kernels.gated_mlp import prepare, supports
    except ImportError as error:
        return f"Triton is not installed ({error})"
    if name.startswith("cublas") and site.layout == "separate":
        return "gate and up have a weight each, which one product would have to copy into one"
    if not (site.features.is_Integer and site.inner.is_Integer):
        return UNKNOWN
    if site.dropout and not philox.fine_enough(site.dropout):
        return f"our kernel drops out with 16 random bits, too few for p = {site.dropout}"
    device = site.root.meta.device
    for dtype in (site.dtype, site.root.dtype):
        reason = supports(device, dtype)
        if reason is not None:
            return reason
    try:
        prepare(site.formula)
    except Unsupported as error:
        return str(error)
    return None


def _why_not_for_hopper(site: GatedMLPSite, rows: sympy.Expr | int, training: bool) -> str | None:
    """Why the kernels for Hopper, which are what was measured, do not compute a site; None if they do, as far as is
    known at compile time."""
    from xfcompile.kernels.gated_mlp import launch_few, launch_hopper
    from xfcompile.kernels.gated_mlp.tiles import HOPPER_FEW_ROWS

    if any(w.order != tuple(range(len(w.order))) for w in site.weights):
        return "weights that are transposed are not measured to be faster"
    if site.features % 8 != 0 or site.inner % 8 != 0:
        return "TMA reads rows that start at multiples of 16 bytes"
    if min(site.features, site.inner) < tiles.SHORTEST:
        return f"not measured with fewer than {tiles.SHORTEST} features"
    if site.layout in ("gate even", "up even"):
        return "features of gate and up in turns are not measured to be faster"
    if site.dropout or site.root.dtype != site.dtype:
        return UNMEASURED
    if rows <= HOPPER_FEW_ROWS:
        return launch_few.missing(site.formula)
    return launch_hopper.unavailable(site.formula, training)
