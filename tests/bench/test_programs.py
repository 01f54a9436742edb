"""The programs that are timed are matched, in 16 bits, in inference and training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule

import xfcompile
from xfcompile.bench.programs import Program, Sizes, programs, tensors


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("program", programs(torch.bfloat16), ids=lambda program: program.name)
def test_each_is_matched(program: Program, train: bool) -> None:
    x = tensors(program, Sizes(2, 4, 300, 64), torch.device("cpu"), torch.bfloat16)
    for leaf in x if program.learned else x[:3]:
        leaf.requires_grad_(train)
    sites = []

    def read(gm: GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        sites.extend(xfcompile.rewrite(gm, inputs, {"routes": {"attention": "triton"}, "strict": True}).sites)
        return gm.forward

    with torch.set_grad_enabled(train):
        torch.compile(program.plain, backend=read, dynamic=False)(*x)
    assert [site.reason for site in sites if site.route is None] == []
    assert len(sites) == 1
