"""What is compared: the names of the columns, and how a function is compiled as each of them says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from xfcompile.bench.job import Skip

EAGER, INDUCTOR, MAX, FLEX, TOLD, LIGER, FLOOR = (
    "eager", "inductor", "max-autotune", "flex", "told", "liger", "floor"
)  # fmt: skip
SDPA = "sdpa"
XFORMERS, XFORMERS_MAX = "xformers", "xformers-max-autotune"
OURS = "xformers"
"""How the names of this backend's columns begin; what follows a hyphen is a mode, or a route that is forced."""

AUTOTUNE = "max-autotune-no-cudagraphs"
"""The mode behind the columns of max-autotune. CUDA graphs would copy a program's inputs at each call, which are no
inputs in a model; what is small enough to need them is timed as a CUDA graph in all columns."""


@dataclass(frozen=True)
class Column:
    """label: how tables and plots call it. what: in a sentence."""

    name: str
    label: str
    what: str


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column(EAGER, "eager", "PyTorch as it is written"),
        Column(INDUCTOR, "Inductor", "torch.compile"),
        Column(MAX, "max-autotune", f"torch.compile(mode={AUTOTUNE!r})"),
        Column(FLEX, "FlexAttention", "FlexAttention by hand, its block mask made beforehand; of a model, its own"),
        Column(SDPA, "SDPA", "scaled_dot_product_attention by hand, the mask made beforehand, torch's own choice"),
        Column("sdpa-cudnn", "SDPA cuDNN", "the same by cuDNN"),
        Column("sdpa-flash", "SDPA flash", "the same by FlashAttention"),
        Column("sdpa-efficient", "SDPA efficient", "the same by the memory-efficient kernel"),
        Column("sdpa-math", "SDPA math", "the same by plain operators"),
        Column(LIGER, "Liger", "Liger's fused function between PyTorch's products"),
        Column(TOLD, "SDPA, told by hand", "the model under Inductor, its mask left out and is_causal told to SDPA"),
        Column(FLOOR, "products alone", "the products of matrices alone, by PyTorch"),
        Column(XFORMERS, "xformers", 'torch.compile(backend="xformers")'),
        Column(XFORMERS_MAX, "xformers max-autotune", f'torch.compile(backend="xformers", mode={AUTOTUNE!r})'),
        Column("xformers-triton", "xformers, triton", "this backend, by its Triton kernel wherever it can"),
        Column("xformers-cublas", "xformers, cublas", "this backend, a packed product by cuBLAS and then a kernel"),
        Column("xformers-epilogue", "xformers, epilogue", "this backend, in the epilogue of our product"),
    )
}

SDPA_KERNELS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
SDPAS = (SDPA, *SDPA_KERNELS)


def ours(column: str) -> bool:
    """Whether a column is of this backend."""
    return column.split("-")[0] == OURS


def compiled(
    fn: Any,
    column: str,
    family: str | None = None,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    routes: Mapping[str, str] | None = None,
) -> Any:
    """A function or module as a column compiles it.

    family: whose route the columns "xformers-<route>" force. routes: by family, those that are asked for where a column
    of this backend forces none. mode: what all compiled columns have in place of the
    default; with "reduce-overhead" the columns of max-autotune have CUDA graphs too. dynamic: as for torch.compile.
    """
    if column == EAGER:
        return fn
    if column in (MAX, XFORMERS_MAX):
        mode = "max-autotune" if mode == "reduce-overhead" else AUTOTUNE
    if column in (INDUCTOR, MAX):
        return torch.compile(fn, mode=mode, dynamic=dynamic)
    if not ours(column):
        raise Skip(f"{COLUMNS[column].label} has no way to compile this")
    # What torch loads for the name, rather than the name: this also runs from a checkout that is not installed.
    from xfcompile.entry import xformers

    route = column.removeprefix(OURS).removeprefix("-")
    options: dict[str, Any] | None = {"routes": dict(routes)} if routes else None
    if route and column != XFORMERS_MAX:
        if family is None:
            raise Skip("no single family to force a route of")
        options = {"routes": {family: route}, "patterns": [family], "strict": True}
    if mode is not None and options is not None:
        options |= torch._inductor.list_mode_options(mode)  # torch.compile takes a mode or options
        mode = None
    return torch.compile(fn, backend=xformers, mode=mode, options=options, dynamic=dynamic)


@contextmanager
def sdpa_by(column: str) -> Iterator[None]:
    """Inside, SDPA runs by a column's kernel and by no other."""
    if column == SDPA:
        yield
        return
    with sdpa_kernel(SDPA_KERNELS[column]):
        yield


def within(column: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with SDPA by a column's kernel, in its backward too."""
    if column == SDPA:
        return call

    def run() -> Any:
        with sdpa_by(column):
            return call()

    return run
