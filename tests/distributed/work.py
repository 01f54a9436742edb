"""One of two processes that train a small model together; its gradients are compared with those of one process alone.

python work.py KIND RANK FOLDER
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import xfcompile

WORLD, WIDTH, HEADS, LENGTH = 2, 64, 4, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        i = torch.arange(x.shape[1])
        scores = (q @ k.mT / 4).masked_fill(i > i[:, None], float("-inf"))
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().log_softmax(-1).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    def whole(grad: Any) -> Tensor:
        return grad.full_tensor() if isinstance(grad, DTensor) else grad

    names = [(n.replace("_orig_mod.", "").removeprefix("module."), p.grad) for n, p in model.named_parameters()]
    return {name: whole(grad) for name, grad in names}


def parallel(kind: str, model: nn.Module) -> nn.Module:
    if kind == "tensor":  # results of columns are local, as is usual: no DTensor reaches an attention
        mesh = init_device_mesh("cpu", (WORLD,))
        columns = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
        plan: dict[str, Any] = columns | {name: RowwiseParallel() for name in ("o", "down")}
        for block in model.blocks:  # type: ignore[union-attr]
            parallelize_module(block, mesh, plan)
        return torch.compile(model, backend=xfcompile.xformers)  # type: ignore[return-value]
    if kind == "fsdp":
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend=xfcompile.xformers)  # type: ignore[operator]
            fully_shard(block)
        return fully_shard(model)
    if kind == "ddp_split":
        dist._DEFAULT_FIRST_BUCKET_BYTES = 20_000
    # Buckets of 20 kB: DDPOptimizer splits the graph in the middle of blocks, and through attentions.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02 if kind == "ddp_split" else 25)
    return torch.compile(ddp, backend=xfcompile.xformers)  # type: ignore[return-value]


def main(kind: str, rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    alone = Model()
    model = copy.deepcopy(alone)
    batches = torch.randn(WORLD, 3, LENGTH, WIDTH)
    if kind == "lengths":  # shorter on one rank; Dynamo compiles for the second length with symbols
        steps = [[batches[0], batches[1, :, :7]], [batches[0, :, :5], batches[1, :, :9]]]
    else:
        steps = [[batches[0], batches[1]]]
    ours = parallel(kind, model)
    for step in steps:
        model.zero_grad()
        alone.zero_grad()
        x = step[0] if kind == "tensor" else step[rank]
        with xfcompile.collect() as report, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(ours, x).backward()
        for one in step[:1] if kind == "tensor" else step:
            (loss(alone, one) / (1 if kind == "tensor" else WORLD)).backward()
        expected = gradients(alone)
        for name, grad in gradients(ours).items():
            torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert report.failures == [], report.failures
    attentions = [site for site in report.sites if site.family == "attention"]
    for site in report.sites:
        print(f"{site.family} {site.route} {site.reason}")
    print(f"graphs {report.graphs} attentions {len(attentions)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
