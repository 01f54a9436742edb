"""Runs a few of PTX's instructions by torch: those of `exponential.text`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def run(text: str, given: Sequence[Tensor], results: int) -> list[Tensor]:
    """$0 ... of a text whose operands follow its results."""
    values = dict(zip((f"${results + n}" for n in range(len(given))), given, strict=True))
    for line in text.strip().strip("{}").split("\n"):
        name, _, rest = line.strip().rstrip(";").partition(" ")
        if not name or name == ".reg":
            continue
        to, *operands = rest.split(", ")
        values[to] = INSTRUCTIONS[name](*(_operand(x, values) for x in operands))
    return [values[f"${n}"] for n in range(results)]


def _operand(text: str, values: dict[str, Tensor]) -> Tensor:
    if text.startswith("0f"):
        (number,) = struct.unpack(">f", bytes.fromhex(text[2:]))
        return torch.tensor(number)
    return values[text] if text in values else torch.tensor(int(text), dtype=torch.int32)


def _ex2(x: Tensor) -> Tensor:
    y = torch.exp2(x)
    return torch.where(y < TINY, 0.0, y)  # NaN stays


INSTRUCTIONS = {
    "max.NaN.f32": torch.maximum,
    "add.rn.f32": torch.add,
    "sub.rn.f32": torch.sub,
    "mul.rn.f32": torch.mul,
    "fma.rn.f32": lambda a, b, c: (a.double() * b.double() + c.double()).float(),
    "mov.f32": lambda x: x,
    "mov.b32": lambda x: x,
    "shl.b32": lambda x, n: (x.view(torch.int32) << n).view(torch.float32),
    "ex2.approx.ftz.f32": _ex2,
}
