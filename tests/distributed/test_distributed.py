"""Two processes on CPUs: gradients under DDP, FSDP and tensor parallelism are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def together(kind: str, folder: Path) -> str:
    """What the first of the two processes prints, after both have compared their gradients."""
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "work.py"), kind, str(rank), str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=400)[0])
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-4000:]
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp_split", "lengths", "fsdp", "tensor"])
def test_gradients_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    said = together(kind, tmp_path)
    assert said.count("attention sdpa None") == 2
    graphs = int(said.split("graphs ")[1].split()[0])
    assert graphs > 2 if kind == "ddp_split" else graphs <= 2
