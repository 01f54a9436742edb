"""Chooses how a site runs: the fastest correct route among SDPA, our Triton kernel, and leaving it to Inductor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from xfcompile.emit import HALF
from xfcompile.family import Candidate, Route
from xfcompile.kernels import philox
from xfcompile.magnitude import absorbs
from xfcompile.masks import is_causal
from xfcompile.meaning import Tensor
from xfcompile.measured import CPU, GFX942, SM_80, SM_90, SM_100, Fact, Measured, hardware_of
from xfcompile.order import computed_with
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import AttentionSite, Placed
from xfcompile.sums import summands

DEVICES = ("cpu", "cuda")
"""Where SDPA is put in place of something else; ROCm's devices are called cuda too."""

NARROW = 32
"""The head dim of windows, for which our kernels' tiles were measured (kernels/attention/tiles.py has it too)."""

BIAS_KEYS = 256
"""More keys than this, and SDPA's backward for a bias that needs a gradient is slower than Inductor's: it makes that of
every batch, of the size of all scores, before it is added up. Measured on an H200 (examples/results/models_h200.json):
with 144 keys both take as long (Swin, beside Inductor's), with 1024 SDPA loses (T5)."""

FEW_KEYS = 256
"""Up to this many keys a mask has two tiles a row: looking which of them can be left out saves nothing. In a training
step of Whisper, 16 x 12 x 256 x 256, SDPA's kernels and ours differ by less than 1 % of the step."""

FEW_QUERIES = 32
"""Fewer query rows than this leave most of a GPU idle in a kernel that gives each block of queries all of its keys.
Ours then splits the keys (kernels/attention/launch_decode.py has the same number)."""

_PROGRAMS = Measured(
    "python -m xfcompile bench attention",
    "2026-11-25",
    "H200, torch 2.11, triton 3.6",
    "examples/results/programs_h200.json",
)
_MODELS = Measured(
    "python -m xfcompile bench models",
    "2026-11-24",
    "H200, torch 2.11, triton 3.6",
    "examples/results/models_h200.json",
)
_DECODING = Measured(
    "python -m xfcompile bench decode",
    "2026-11-24",
    "H100, torch 2.11, triton 3.6",
    "examples/results/decode_h100.json",
)
_PROFILES = Measured(
    "examples/profile_model.py",
    "2026-11-29",
    "H200, torch 2.11, triton 3.6",
    "examples/results/profiles_h200.json",
)
_CPU = Measured(
    "python -m xfcompile bench attention", "2026-11-24", "2 CPU threads, torch 2.13", "examples/results/cpu.json"
)

_WINDOWS = Measured(
    "examples/bench_few_keys.py", "2026-11-29", "H200, torch 2.11, triton 3.6", "examples/results/few_keys_h200.json"
)

CLASSES = (
    "plain", "plain, few queries", "learned bias, few keys", "learned bias, windows", "own mask, few keys",
    "few queries", "other",
)  # fmt: skip
"""plain: SDPA is told all without a mask tensor. learned bias: a term of the score needs a gradient, and one for each
score; of T5's, which has one for each distance, SDPA computes the mathematics in fp32, for as its table lies in memory
no fused kernel takes it (8 x 12 x 256 x 256, examples/results/t5_profile_h200.json). windows: the same of few keys, and
heads for which the kernels have tiles of their own (`tiles.few_keys`). own mask: the program calls SDPA with a mask of
which nothing is known; of so few keys SDPA's kernels take no longer than ours, which Python launches one by one
(Whisper's decoder). few queries: fewer than `FEW_QUERIES`, of what may be many keys."""

_GPU: dict[str, Fact[tuple[str, ...]]] = {
    "plain": Fact(("sdpa", "triton"), _PROGRAMS),
    "plain, few queries": Fact(("sdpa", "triton"), _DECODING),
    "learned bias, few keys": Fact(("sdpa", "triton"), _MODELS),
    "learned bias, windows": Fact(("triton", "sdpa"), _WINDOWS),
    "own mask, few keys": Fact(("sdpa", "triton"), _PROFILES),
    "few queries": Fact(("triton", "sdpa"), _DECODING),
    "other": Fact(("triton", "sdpa"), _PROGRAMS),
}

ROUTES: dict[tuple[str, str], Fact[tuple[str, ...]]] = {
    **{(SM_90, name): fact for name, fact in _GPU.items()},
    **{(kind, name): Fact(fact.value) for kind in (SM_80, SM_100, GFX942) for name, fact in _GPU.items()},
    **{(kind, "learned bias, windows"): Fact(("sdpa", "triton")) for kind in (SM_80, SM_100, GFX942)},
    **{(CPU, name): Fact(("sdpa",), _CPU) for name in CLASSES},
}
"""By hardware and class of sites: the routes in the order in which they are taken, the first that can be. Where none
can be, a site is left to Inductor. Other hardware has SDPA."""


UNKNOWN = "a head dimension is not known at compile time"


@dataclass(frozen=True)
class Told:
    """What SDPA can be told of a site: coefficient * s + rest, masked by `keep`."""

    coefficient: sympy.Expr
    rest: sympy.Expr
    causal: bool
    keep: sympy.Basic

    @property
    def plain(self) -> bool:
        """No mask tensor at all."""
        return self.rest == 0 and self.keep == sympy.true


@dataclass(frozen=True, kw_only=True)
class AttentionCandidate(Candidate):
    """An attention at a node, with the readings of its operands that were chosen there, and the score of these.

    words: what SDPA is told of it, where that is its route. training: whether its result needs a gradient.
    loads: what the score loads from, in the program's names.
    """

    site: AttentionSite
    q: Placed
    k: Placed
    v: Placed
    score: sympy.Expr
    words: Told | None = None
    training: bool = False
    loads: tuple[Tensor, ...] = ()


def told(site: AttentionSite, score: sympy.Expr) -> Told | str:
    """The site in SDPA's words, or why it has none."""
    if site.sink is not None:
        return "SDPA knows no attention sinks"
    coefficient = score.coeff(S, 1)
    rest = sympy.expand(score - coefficient * S)
    if S in rest.free_symbols or S in coefficient.free_symbols:
        expanded = sympy.expand(score)
        coefficient = expanded.coeff(S, 1)
        rest = sympy.expand(expanded - coefficient * S)
    if S in rest.free_symbols or S in coefficient.free_symbols or coefficient == 0:
        return "the score is not linear in q·k"
    if J in coefficient.free_symbols:
        return "the scale depends on the key"
    # As the program has it: expanded, (j - i) * (j - i + 3) is a difference of far numbers.
    rest = score.xreplace({S: sympy.S.Zero})
    # What is the same for a whole row is a shift that softmax does not see, as long as the scores survive it, and as
    # what is left is no larger: of slope * (j - i), slope * j would be rounded where it is far from 0.
    terms = summands(rest) if isinstance(rest, sympy.Add) else [rest]
    rest = sympy.Add(*(t for t in terms if J in t.free_symbols or absorbs(t, site.loads, strict=True)))
    causal = rest == 0 and is_causal(site.keep) and sympy.expand(site.queries - site.keys) == 0
    return Told(coefficient, rest, causal, sympy.true if causal else site.keep)


def swallows(site: AttentionSite, words: Told | None) -> bool:
    """Whether nothing may be left of a row's scores beside its masks and biases."""
    return site.full is not None or (words is not None and absorbs(words.rest, site.loads, finite=True))


def choose(
    site: AttentionSite,
    score: sympy.Expr,
    *,
    training: bool,
    bias_grad: bool,
    forced: Mapping[str, str],
    distances: bool = False,
    why_no_backward: str | None = None,
) -> tuple[Route, Told | None]:
    """The route of a site whose score, in terms of the chosen operands, is `score`. distances: whether what of it needs
    a gradient depends on how far a key is from its query, and on nothing else of the two. why_no_backward: of our
    kernel, if that can't be had whatever the score."""
    device = site.root.meta.device.type
    wanted = forced.get(site.family)
    words = told(site, score)
    sayable = words if isinstance(words, Told) else None
    kernel = why_no_backward or _why_no_kernel(site, score, sayable, training, bias_grad)
    sdpa = _why_no_sdpa(site, words, device, bias_grad)
    if training and site.call is None and (site.leaks or swallows(site, sayable)):
        sdpa = "rows that may see no key send gradients through their added masks, which no fused kernel does"
    if wanted == "inductor":
        return Route("inductor", "asked for"), None
    if wanted == "sdpa":
        return (Route("inductor", sdpa), None) if sdpa else (Route("sdpa", "asked for"), sayable)
    if wanted == "triton":
        return (Route("inductor", kernel), None) if kernel else (Route("triton", "asked for"), sayable)
    why_not = {"sdpa": sdpa, "triton": kernel or _why_slow_kernel(site)}
    kind = shape_class(site, sayable, bias_grad and not distances)
    order = ROUTES.get((hardware_of(site.root.meta.device), kind), Fact(("sdpa",))).value
    name = next((name for name in order if why_not[name] is None), "inductor")
    if name == "inductor":
        return Route("inductor", sdpa if device == "cpu" else why_not["triton"] or sdpa), None
    reason: str | None = None
    if name == "triton" and _few_queries(site):
        reason = "few queries: their keys are split over the GPU"
    elif name == order[0]:
        reason = _REASONS.get((name, kind))
    elif name == "sdpa":
        reason = why_not[order[0]]
    return Route(name, reason), sayable


_LEARNED = f"a term of the score needs a gradient, and there are no more than {BIAS_KEYS} keys"
_REASONS: dict[tuple[str, str], str] = {
    ("sdpa", "learned bias, few keys"): _LEARNED,
    ("sdpa", "learned bias, windows"): _LEARNED,
    ("sdpa", "own mask, few keys"): f"nothing is known of its mask, and there are no more than {FEW_KEYS} keys",
}
"""Why a route is taken that is not the one that one would expect, by itself and the class of a site."""


def shape_class(site: AttentionSite, words: Told | None, bias_grad: bool) -> str:
    """One of `CLASSES`. words: the site in SDPA's, if it has any. bias_grad: whether a gradient for each score is
    wanted, not only one for each distance."""
    few = _few_queries(site)
    if words is not None and words.plain:
        return "plain, few queries" if few else "plain"
    if bias_grad and _at_most(site.keys, BIAS_KEYS) and words is not None:
        windows = site.head_dim == site.value_dim == NARROW and site.root.dtype in HALF
        return "learned bias, windows" if windows else "learned bias, few keys"
    if few:
        return "few queries"
    if _at_most(site.keys, FEW_KEYS) and site.call is not None and _is_given(words):
        return "own mask, few keys"
    return "other"


def _at_most(keys: Any, most: int) -> bool:
    """As far as sizes are known."""
    n = sympy.sympify(keys)
    return bool(n.is_Integer and n <= most)


def _is_given(words: Told | None) -> bool:
    """Whether all that stands between is a mask with an element for each query and key, as it lies in memory."""
    if words is None or words.rest != 0 or not isinstance(words.keep, sympy.Ne):
        return False
    load, zero = words.keep.args
    return isinstance(load, Load) and load.args[-2:] == (I, J) and zero == 0


def _why_no_sdpa(site: AttentionSite, words: Told | str, device: str, bias_grad: bool) -> str | None:
    if isinstance(words, str):
        return words
    if device not in DEVICES:
        return f"SDPA is tested on CPUs and on CUDA and ROCm devices, not on {device}"
    if site.call is None and not torch.backends.cuda.math_sdp_enabled():
        return "SDPA's math backend is switched off, and the others may refuse"
    if words.keep == sympy.false:
        return "no key is kept at all"
    if site.full is not None and words.rest == 0 and not site.alive:
        return "a row may see no key, and what it scores may be as low as a masked key"
    if site.rounding in HALF:
        name = str(site.rounding).removeprefix("torch.")
        return f"a row may see no key, and gets what {name} leaves of its scores beside its masks"
    if site.rounding is not None and (site.full is not None or _added_apart(site, words)):
        return "a row may see no key, and SDPA adds its masks and biases in another order"
    if site.root.dtype not in (*HALF, torch.float32, torch.float64):
        return f"SDPA has no kernel for {site.root.dtype}"
    if site.head_dim != site.value_dim:
        return "queries and values have different head dimensions, for which SDPA has no fused kernel"
    if site.dropout == 1:
        return "all weights are dropped out"
    if site.dropout and device == "cpu":
        return "SDPA drops no weights out on CPUs"
    if site.dropout and site.dead == "mean" and not site.alive:
        return "the weights of rows that may see no key are dropped out too"
    if bias_grad and device == "cpu":
        return "a term of the score needs a gradient, which SDPA on CPUs has only unfused"
    if bias_grad and site.call is None and not _at_most(site.keys, BIAS_KEYS):
        return f"a term of the score needs a gradient, for which SDPA is slower beyond {BIAS_KEYS} keys"
    if device == "cuda" and site.call is None and site.root.dtype in HALF and _is_wide(words.rest, site):
        name = str(site.root.dtype).removeprefix("torch.")
        return f"on GPUs SDPA takes biases in {name}, which rounds those that are computed in fp32"
    if device == "cpu" and _materialised(site, words) > 4:
        return "SDPA would need a bias of the size of all scores"
    return None


def _is_wide(rest: sympy.Expr, site: AttentionSite) -> bool:
    """Whether a bias is computed of positions, or of numbers of more than 16 bits."""
    for x in computed_with(rest):
        if not isinstance(x, Load):
            return True
        dtype = site.loads[x.operand].dtype
        if dtype.is_floating_point and dtype.itemsize > 2:
            return True
    return False


def _added_apart(site: AttentionSite, words: Told) -> bool:
    """Whether masks and biases are added to scores one after the other."""
    if site.order.summed is not None or not isinstance(words.rest, sympy.Add):
        return False
    return sum(J in term.free_symbols for term in words.rest.args) > 1


def _materialised(site: AttentionSite, words: Told) -> int:
    """How many of the batch axes an explicit bias spans that no tensor of the program spans already."""
    symbols = (words.rest.free_symbols | words.keep.free_symbols) & {B, H}
    loads = words.rest.atoms(Load) | words.keep.atoms(Load)
    spanned = set().union(*(load.free_symbols & {B, H} for load in loads)) if loads else set()
    both = symbols == {B, H} and not any(load.free_symbols >= {B, H} for load in loads)
    return 8 if both and len(site.lead) > 2 and spanned else 0


def _few_queries(site: AttentionSite) -> bool:
    """As far as sizes are known: a few queries against what may be many keys."""
    queries, keys = sympy.sympify(site.queries), sympy.sympify(site.keys)
    return bool(queries.is_Integer and queries < FEW_QUERIES and not (keys.is_Integer and keys < FEW_QUERIES))


def _why_slow_kernel(site: AttentionSite) -> str | None:
    """Why our kernel is right but not worth its while; no reason where it is asked for."""
    if _few_queries(site) and site.full is not None:
        return "rows that score as low as masked keys see all keys, for which our kernel does not split the keys"
    return None


def _why_no_kernel(
    site: AttentionSite, score: sympy.Expr, words: Told | None, training: bool, bias_grad: bool
) -> str | None:
    if training:
        reason = _why_no_backward(site, score, bias_grad)
        if reason is not None:
            return reason
    if site.dropout and not philox.fine_enough(site.dropout):
        return f"a rate of dropout of {site.dropout:g} is finer than our kernel's random numbers"
    if site.dropout == 1:
        return "all weights are dropped out"
    if site.sizes and site.sizes[-1] == 0:
        return "there are no heads"
    device = site.root.meta.device
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton kernel runs on CPUs only interpreted (TRITON_INTERPRET=1)"
    try:
        from xfcompile.kernels.attention import supports
    except ImportError as error:
        return f"Triton is not installed ({error})"
    tiny = next((x.dtype for x in site.loads if x.dtype.is_floating_point and x.dtype.itemsize == 1), None)
    if tiny is not None:
        return f"the score loads from a tensor of {str(tiny).removeprefix('torch.')}, which not all GPUs read"
    for size in (site.head_dim, site.value_dim):
        if not sympy.sympify(size).is_Integer:
            return UNKNOWN
    return supports(device, _kernel_dtype(site), int(site.head_dim), int(site.value_dim))


def _why_no_backward(site: AttentionSite, score: sympy.Expr, bias_grad: bool) -> str | None:
    if site.leaks and not _leaks_simply(site, bias_grad):
        return "rows that may see no key send gradients through their added masks, which no fused kernel does"
    if site.full is not None or (site.rounding is not None and not site.leaks):
        return "nothing may be left of a row's scores beside its masks, whose gradients no fused kernel has"
    try:
        from xfcompile.kernels.attention import why_no_gradient
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return why_no_gradient(score, site.sink)


def _leaks_simply(site: AttentionSite, bias_grad: bool) -> bool:
    """Whether what rows without keys send to their scores is no more than those of equal weights would have: all keys
    are masked by one number that is added, beside which nothing is left of a score."""
    return site.dead == "mean" and site.one_fill and site.full is None and not bias_grad


def _kernel_dtype(site: AttentionSite) -> torch.dtype:
    return operand_dtype(site, site.q[-1].value.dtype, site.k[-1].value.dtype, site.v[-1].value.dtype)


def operand_dtype(site: AttentionSite, q: torch.dtype, k: torch.dtype, v: torch.dtype) -> torch.dtype:
    """The dtype in which a fused call takes q, k and v: the widest of theirs and of the result's, unless both products
    are narrower (under autocast)."""
    wide = torch.promote_types(torch.promote_types(q, k), v)
    product, result = site.product_dtype, site.root.dtype
    if product in HALF and result in HALF and wide in (torch.float32, torch.float64):
        return product
    return torch.promote_types(wide, result)
