"""One of several processes that train a small model together; its gradients are judged against those of one alone.

python work.py KIND ROUTE RANK WORLD FOLDER
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import xfcompile
from xfcompile.report import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from step import judge

WIDTH, HEADS, LENGTH = 64, 4, 12

OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "kernels": {"routes": {"attention": "triton", "gated_mlp": "triton"}},
    "quick": {},  # without Inductor, which takes most of the time
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = 8 * torch.tanh(q @ k.mT / 32) if self.capped else q @ k.mT / 4
        if self.causal:
            i = torch.arange(x.shape[1])
            scores = scores.masked_fill(i > i[:, None], float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    capped, causal = False, True


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.between, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).log_softmax(-1).square().mean()


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names in a `Model`."""
    return {n.replace("_orig_mod.", "").replace("module.", ""): p for n, p in model.named_parameters()}


# -- ways to share the work -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """A model that several processes have a part of.

    parameters: this process's part of them. place: of this process among those that each have inputs of their own;
    groups: how many of these there are. sharding: of the parameters that are parts but no DTensors.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    place: int = 0
    groups: int = 1
    sharding: dict[str, tuple[DeviceMesh, Any]] = field(default_factory=dict)

    def gradients(self) -> dict[str, Tensor]:
        return {f"gradient {name}": self._whole(name, p.grad) for name, p in self.parameters.items()}

    def _whole(self, name: str, grad: Tensor | None) -> Tensor:
        assert grad is not None, name
        if name in self.sharding:
            grad = DTensor.from_local(grad, *self.sharding[name], run_check=False)
        return grad.full_tensor() if isinstance(grad, DTensor) else grad


def columns(block: nn.Module, mesh: DeviceMesh, local: bool = True) -> None:
    """The usual plan: heads and features of the MLP by columns, the products after them by rows."""
    first: dict[str, Any] = {f"attention.{x}": ColwiseParallel(use_local_output=local) for x in "qkv"}
    first |= {f"mlp.{x}": ColwiseParallel(use_local_output=local) for x in ("gate", "up")}
    parallelize_module(block, mesh, first | {"attention.o": RowwiseParallel(), "mlp.down": RowwiseParallel()})


def sequences(block: nn.Module, mesh: DeviceMesh) -> None:
    """Sequence parallel: between the products each process has its part of the positions."""
    plan: dict[str, Any] = {"before": SequenceParallel(), "between": SequenceParallel()}
    for part, last in (("attention", "o"), ("mlp", "down")):
        plan[part] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        plan[f"{part}.{last}"] = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    plan |= {f"attention.{x}": ColwiseParallel() for x in "qkv"}
    plan |= {f"mlp.{x}": ColwiseParallel() for x in ("gate", "up")}
    parallelize_module(block, mesh, plan)


class Split(nn.Module):
    """A model whose blocks take each process's part of the positions, for inputs and results that are whole."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.module, self.mesh = model, mesh

    def forward(self, x: Tensor) -> Tensor:
        x = DTensor.from_local(x, self.mesh, (Replicate(),), run_check=False).redistribute(placements=(Shard(1),))
        for block in self.module.blocks:  # type: ignore[union-attr]
            x = block(x)
        whole = x.redistribute(placements=(Replicate(),)).to_local()  # type: ignore[attr-defined]
        return self.module.head(whole)  # type: ignore[operator]


def share(kind: str, model: nn.Module, rank: int, world: int, backend: Any) -> Shared:
    def compiled(m: nn.Module) -> nn.Module:
        return torch.compile(m, backend=backend)  # type: ignore[return-value]

    blocks: Sequence[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
    if kind in ("tensor", "dtensor", "sequence"):
        mesh = init_device_mesh("cpu", (world,))
        for block in blocks:
            sequences(block, mesh) if kind == "sequence" else columns(block, mesh, kind == "tensor")
        return Shared(compiled(Split(model, mesh) if kind == "sequence" else model), parameters(model))
    if kind in ("ddp_tensor", "fsdp_tensor"):
        both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        place, sharding = both["data"].get_local_rank(), {}
        for block in blocks:
            columns(block, both["tensor"])
        if kind == "fsdp_tensor":
            return Shared(fully(model, backend, mesh=both["data"]), parameters(model), place, 2)
        for name, p in parameters(model).items():
            if isinstance(p, DTensor):  # DDP makes it a tensor
                sharding[name] = (both["tensor"], p.placements)
        ddp = DistributedDataParallel(model, device_mesh=both["data"])
        return Shared(compiled(ddp), parameters(model), place, 2, sharding)
    if kind == "fsdp":
        return Shared(fully(model, backend), parameters(model), rank, world)
    if kind == "ddp_split":
        dist._DEFAULT_FIRST_BUCKET_BYTES = 20_000
    # Buckets of 20 kB: DDPOptimizer splits the graph in the middle of blocks, and through attentions.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02 if kind == "ddp_split" else 25)
    return Shared(compiled(ddp), parameters(model), rank, world)


def fully(model: nn.Module, backend: Any, **how: Any) -> nn.Module:
    """FSDP of each block, which is compiled, and of the whole."""
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)  # type: ignore[operator]
        fully_shard(block, **how)
    return fully_shard(model, **how)


# -- one process ----------------------------------------------------------------------------------------------------


def without_inductor(gm: fx.GraphModule, example_inputs: Any) -> Any:
    publish(xfcompile.rewrite(gm, example_inputs, {"strict": True}))
    return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)


def alone(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of one process that has all inputs, in eager."""
    model = copy.deepcopy(model).to(dtype)
    for x in inputs:
        (loss(model, x.to(dtype)) / len(inputs)).backward()
    return Shared(model, parameters(model)).gradients()


def main(kind: str, route: str, rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    # DTensors are masked by none but DTensors. Of what is not capped, Inductor's own SDPA refuses DTensors on CPUs.
    Attention.capped, Attention.causal = route == "kernels" or kind == "dtensor", kind != "dtensor"
    model = Model(1 if route == "quick" else 2)
    batches = list(torch.randn(world, 3, LENGTH, WIDTH))
    steps = [batches]
    if kind == "lengths":  # a length for each process, then others: Dynamo compiles with symbols
        steps = [[x[:, : LENGTH - n] for n, x in enumerate(batches)], [x[:, : 4 + n] for n, x in enumerate(batches)]]
    options = OPTIONS[route]
    backend = without_inductor if route == "quick" else lambda gm, x: xfcompile.xformers(gm, x, options=options)
    shared = share(kind, copy.deepcopy(model), rank, world, backend)
    sites: list[str] = []
    graphs = 0
    for step in steps:
        shared.model.zero_grad()
        inputs = step[: shared.groups]
        with xfcompile.collect() as report, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(shared.model, inputs[shared.place]).backward()
        assert report.failures == [], report.failures
        sites += [f"{site.family} {site.route} {site.reason}" for site in report.sites]
        graphs = report.graphs
        exact, eager = (alone(model, inputs, dtype) for dtype in (torch.float64, torch.float32))
        judge(exact, eager, shared.gradients(), torch.finfo().eps)
    print("\n".join(sites))
    print(f"graphs {graphs}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
