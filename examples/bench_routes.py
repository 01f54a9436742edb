"""Measures what the choice of routes and tiles rests on: SDPA's back-ends, grouped heads, masks, tile sizes.

    python examples/bench_routes.py --out examples/results/routes.json

Needs a CUDA GPU. Times are medians in ms of the call alone, in bf16 (`triton.testing.do_bench`).
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path

import sympy
import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xfcompile.kernels.attention import launch_blocks, prepare, tiles
from xfcompile.kernels.attention.programs import program
from xfcompile.score import B, H, I, J, Load, S
from xfcompile.site import Band, Operand, ScoreSpec

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def median(call: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(call, warmup=15, rep=60, return_mode="median"))


def attempt(call: Callable[[], object]) -> float | str:
    try:
        return round(median(call), 4)
    except Exception as error:  # a back-end that refuses is a result
        return str(error).split("\n")[0][:60]


def heads(x: Tensor, count: int) -> Tensor:
    """[b, kv, s, d] to [b, count, s, d], as transformers expands grouped heads."""
    b, kv, s, d = x.shape
    return x[:, :, None].expand(b, kv, count // kv, s, d).reshape(b, count, s, d)


def sdpa_facts() -> list[dict[str, object]]:
    cases: list[tuple[str, tuple[int, int, int, int, int], dict[str, object]]] = [
        ("Llama: causal, 32/8 heads", (2, 32, 8, 4096, 64), {"is_causal": True}),
        ("causal, 32/8 heads, D128", (2, 32, 8, 4096, 128), {"is_causal": True}),
        ("ViT: S 577", (32, 16, 16, 577, 64), {}),
        ("BERT: S 512", (32, 12, 12, 512, 64), {}),
        ("T5: bias [1, h, s, s]", (8, 12, 12, 1024, 64), {"bias": "hij"}),
        ("padding [b, 1, 1, s]", (8, 32, 32, 1024, 64), {"bias": "bj"}),
        ("dense boolean mask", (2, 32, 32, 4096, 64), {"bias": "mask"}),
    ]
    rows = []
    for name, (b, h, kv, s, d), how in track(cases, "SDPA"):
        q = torch.randn(b, s, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        k, v = (
            torch.randn(b, s, kv, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for _ in range(2)
        )
        kwargs: dict[str, object] = {"is_causal": bool(how.get("is_causal"))}
        bias = how.get("bias")
        if bias == "hij":
            kwargs["attn_mask"] = torch.randn(1, h, s, s, device="cuda", dtype=torch.bfloat16)
        elif bias == "bj":
            kwargs["attn_mask"] = (torch.rand(b, 1, 1, s, device="cuda") > 0.2).expand(b, 1, s, s)
        elif bias == "mask":
            kwargs["attn_mask"] = (
                torch.ones(s, s, dtype=torch.bool, device="cuda").tril()[None, None].expand(b, 1, s, s)
            )
        dout = torch.randn(b, h, s, d, device="cuda", dtype=torch.bfloat16)
        variants: dict[str, Callable[[], Tensor]] = {}
        if kv != h:
            variants["enable_gqa"] = lambda q=q, k=k, v=v, kw=kwargs: F.scaled_dot_product_attention(
                q, k, v, enable_gqa=True, **kw
            )
            variants["expanded"] = lambda q=q, k=k, v=v, h=h, kw=kwargs: F.scaled_dot_product_attention(
                q, heads(k, h), heads(v, h), **kw
            )
        else:
            variants["as it is"] = lambda q=q, k=k, v=v, kw=kwargs: F.scaled_dot_product_attention(q, k, v, **kw)
        for variant, call in variants.items():
            for backend, chosen in BACKENDS.items():

                def forward(call: Callable[[], Tensor] = call, chosen: SDPBackend | None = chosen) -> Tensor:
                    if chosen is None:
                        return call()
                    with sdpa_kernel(chosen):
                        return call()

                def both(forward: Callable[[], Tensor] = forward, dout: Tensor = dout, xs: tuple = (q, k, v)) -> object:
                    return torch.autograd.grad(forward(), xs, dout)

                with torch.no_grad():
                    ahead = attempt(forward)
                rows.append(
                    {
                        "case": name,
                        "variant": variant,
                        "backend": backend,
                        "forward": ahead,
                        "forward+backward": attempt(both),
                    }
                )
    return rows


def specs(d: int) -> dict[str, tuple[ScoreSpec, Callable[[int, int, int], list[Tensor]]]]:
    scaled = S / sympy.sqrt(sympy.Integer(d)).evalf()
    causal = Band(None, I + 1, True)

    def dense(b: int, h: int, s: int) -> list[Tensor]:
        return [torch.randn(1, h, s, s, device="cuda", dtype=torch.bfloat16)]

    def keys(b: int, h: int, s: int) -> list[Tensor]:
        return [torch.arange(s, device="cuda")[None] < torch.full((b, 1), s - s // 8, device="cuda")]

    bias = (Operand(torch.bfloat16, 4),)
    real = (Operand(torch.bool, 2),)
    none: Callable[[int, int, int], list[Tensor]] = lambda b, h, s: []  # noqa: E731
    padded = sympy.Ne(Load(0, B, J), 0)
    return {
        "none": (ScoreSpec(scaled), none),
        "causal": (ScoreSpec(scaled, keep=sympy.Le(J, I), band=causal), none),
        "window 256": (
            ScoreSpec(scaled, keep=sympy.And(J <= I, J > I - 256), band=Band(I - 255, I + 1, True)),
            none,
        ),
        "soft-cap": (ScoreSpec(50 * sympy.tanh(scaled / 50)), none),
        "dense bias": (ScoreSpec(scaled + Load(0, 0, H, I, J), operands=bias), dense),
        "padding": (ScoreSpec(scaled, keep=padded, operands=real), keys),
        "causal & padding": (
            ScoreSpec(scaled, keep=sympy.And(J <= I, padded), operands=real, band=Band(None, I + 1, False)),
            keys,
        ),
    }


TILES = [
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (64, 64, 4, 3),
    (128, 32, 4, 3),
    (64, 128, 4, 2),
    (128, 128, 8, 3),
]


def tile_facts(budget: list[str]) -> list[dict[str, object]]:
    rows = []
    jobs = [(d, name) for d in (64, 128) for name in specs(d) if not budget or name in budget]
    for d, name in track(jobs, "tiles"):
        b, h, s = 4, 2048 // d, 4096
        spec, operands = specs(d)[name]
        q, k, v = (torch.randn(b, s, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
        given = operands(b, h, s)
        key = prepare(spec)
        for shape in TILES:
            program(key).fitting.clear()
            chosen = tiles.Tiles(*shape)
            original = launch_blocks.choose
            launch_blocks.choose = lambda *_, chosen=chosen: chosen  # type: ignore[attr-defined]
            try:
                time = attempt(functools.partial(torch.ops.xfcompile.attention, q, k, v, given, [], [], key))
                used = list(program(key).fitting.values())
                fits = bool(used) and used[0] == chosen
            finally:
                launch_blocks.choose = original  # type: ignore[attr-defined]
            rows.append({"program": name, "d": d, "tiles": list(shape), "forward": time if fits else "does not fit"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--only", choices=["sdpa", "tiles"], default=None)
    parser.add_argument("--programs", nargs="*", default=[])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_routes.py needs a CUDA GPU; none is visible")
    console = Console(width=150)
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
    }
    for part, measure in (("sdpa", sdpa_facts), ("tiles", lambda: tile_facts(arguments.programs))):
        if arguments.only not in (None, part):
            continue
        rows = measure()
        facts[part] = rows
        table = Table(title=f"{part}, ms, {facts['device']}")
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(str(x) for x in row.values()))
        console.print(table)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
