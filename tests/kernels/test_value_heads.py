"""Values whose heads are of another size than those of queries and keys, and are split where an operand is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import xfcompile

pytestmark = [pytest.mark.usefixtures("interpreter"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SPLITS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads, dims": lambda x: x.view(2, 6, 4, -1).transpose(1, 2),
    "heads, keys, dims": lambda x: x.view(2, 4, 6, -1),
    "heads that are shared": lambda x: x.view(2, 6, 4, -1)[:, :, :2].transpose(1, 2).repeat_interleave(2, 1),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("wide", [4, 16])
def test_values_are_split_into_heads_of_their_own_size(name: str, wide: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ SPLITS[name](k).mT * 0.2).softmax(-1) @ SPLITS[name](v)

    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 6, 32), torch.randn(2, 6, 4 * wide)
    report = xfcompile.Report()

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        report.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True, "routes": {"attention": "triton"}}))
        return gm

    ours = torch.compile(attention, backend=backend)(q, k, v)
    assert [site.route for site in report.sites] == ["triton"]
    torch.testing.assert_close(ours, attention(q, k, v))
