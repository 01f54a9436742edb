"""A family of someone else's in one file: residual + RMSNorm as one op, found in a model that writes it out.

python examples/extension.py
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

import xfcompile
from xfcompile.emit import Emitter
from xfcompile.family import Candidate, Route, Setting
from xfcompile.read import Reading
from xfcompile.site import Miss
from xfcompile.values import Value


@torch.library.custom_op("example::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op; a kernel would be launched here."""
    return nn.functional.rms_norm(x + residual, x.shape[-1:], weight, eps)


@add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Site:
    """`weight * h * rsqrt(mean(h * h) + eps)` over the last dimension, where h = x + residual."""

    root: Value
    interior: tuple[Value, ...]
    x: Value
    residual: Value
    weight: Value
    eps: float


def anchors(values: list[Value]) -> Iterator[Value]:
    return (value for value in values if value.op == "rsqrt")


def match(root: Value, users: dict[Value, list[Value]]) -> list[Site]:
    shifted = root["self"]
    mean = shifted.args.get("self")
    square = mean.args.get("self") if isinstance(mean, Value) and mean.op == "mean" else None
    if shifted.op != "add" or shifted["alpha"] != 1 or not isinstance(shifted["other"], float) or square is None:
        return []  # rsqrt of something else
    h = square["self"] if square.op == "pow" and square["exponent"] == 2 else None
    if h is None or h.op != "add" or h["alpha"] != 1 or not all(isinstance(h[n], Value) for n in ("self", "other")):
        return []
    x, residual = h["self"], h["other"]
    if mean["dim"] not in ((-1,), (h.ndim - 1,)) or not mean["keepdim"] or mean["dtype"] is not None:
        raise Miss("the mean is not over the last dimension", mean)
    if not x.meta.dtype == residual.dtype == root.dtype or not x.shape == residual.shape == h.shape:
        raise Miss("the sum changes dtypes or broadcasts", h)
    scaled = [u for u in users.get(root, ()) if u.op == "mul" and {u["self"], u["other"]} == {h, root}]
    found = []
    for normed in scaled:
        for out in (u for u in users.get(normed, ()) if u.op == "mul"):
            weight = out["self"] if out["other"] is normed else out["other"]
            if isinstance(weight, Value) and weight.shape == h.shape[-1:] and weight.dtype == h.dtype == out.dtype:
                interior = (square, mean, shifted, root, normed)
                found.append(Site(out, interior, x, residual, weight, shifted["other"]))
    return found


def at_node(reading: Reading, site: Site, node: fx.Node) -> Candidate:
    operands = (site.x, site.residual, site.weight)
    for value in operands:
        Emitter(reading, node, {}).held(value)
    return Candidate(site=site, node=node, operands=operands)


def plan(reading: Reading, candidate: Candidate, setting: Setting) -> Candidate:
    if setting.training:
        return replace(candidate, route=Route("inductor", "the op has no backward"))
    return replace(candidate, route=Route(setting.routes.get("add_rms_norm", "fused")))


def write(emitter: Emitter, candidate: Candidate) -> fx.Node:
    site: Site = candidate.site  # type: ignore[assignment]
    tensors = [emitter.held(value) for value in (site.x, site.residual, site.weight)]
    return emitter.call(torch.ops.example.add_rms_norm.default, *tensors, site.eps)


FAMILY: xfcompile.Family[Site, Candidate] = xfcompile.Family(
    "add_rms_norm", ("fused", "inductor"), anchors, match, at_node, plan, write
)


class Block(nn.Module):
    """Knows nothing of all this."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        h = x + residual
        normed = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        return h + self.down(torch.relu(self.up(normed)))


if __name__ == "__main__":
    xfcompile.register_family(FAMILY)
    block, x = Block(64), torch.randn(2, 16, 64)
    with torch.no_grad():
        print(xfcompile.verify(block, x, x))
        compiled = torch.compile(block, backend=xfcompile.xformers)
        torch.testing.assert_close(compiled(x, x), block(x, x))
