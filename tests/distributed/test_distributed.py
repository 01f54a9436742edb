"""Several processes on CPUs: gradients under DDP, FSDP and tensor parallelism are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

KINDS = ["ddp", "ddp_split", "lengths", "fsdp", "tensor", "sequence", "dtensor"]
"""lengths: of sequences, others in each process and each step. sequence: tensor parallel, with positions shared out
between the products. dtensor: tensor parallel whose columns stay DTensors, through attention and gated MLP."""


def together(kind: str, route: str, world: int, folder: Path) -> list[str]:
    """What the first of the processes says of its sites, after all have judged their gradients."""
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if route == "kernels":
        env["TRITON_INTERPRET"] = "1"
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "work.py"), kind, route, str(rank), str(world), str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=500)[0])
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return said[0].splitlines()


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    said = together("ddp", "quick", 2, tmp_path)
    assert "attention sdpa None" in said and "graphs 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", [*KINDS, "ddp_tensor", "fsdp_tensor"])
def test_gradients_are_those_of_one_process(kind: str, world: int, tmp_path: Path) -> None:
    if kind.endswith("_tensor") and world == 2:
        pytest.skip("two by two processes are four")
    said = together(kind, "usual", world, tmp_path)
    # Both blocks, at both lengths: in the second step with symbols.
    expected = "it computes with tensors of the class DTensor" if kind == "dtensor" else None
    route = "None" if kind == "dtensor" else "sdpa"
    assert said.count(f"attention {route} {expected}") == (4 if kind == "lengths" else 2), said
    assert not any(line.startswith("attention inductor") for line in said), said
    (graphs,) = (int(line.split()[1]) for line in said if line.startswith("graphs "))
    if kind == "ddp_split":
        assert graphs > 2
    elif kind != "ddp_tensor":  # whose hooks, which make parameters DTensors, break the graph
        assert graphs <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp_split", "lengths", "fsdp", "tensor"])
def test_gradients_of_our_kernels_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    said = together(kind, "kernels", 2, tmp_path)
    assert said.count("attention triton asked for") == (4 if kind == "lengths" else 2), said
    # What tensor parallelism makes of linears, or DDPOptimizer of graphs, is no gated MLP any more.
    gated = 0 if kind in ("tensor", "ddp_split") else 4 if kind == "lengths" else 2
    assert said.count("gated_mlp triton asked for") == gated, said
