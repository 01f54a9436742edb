"""Whole graphs as they are after the rewrite: small, and to be read."""

# ruff: noqa: E501 (graphs, a line a node)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from equivalence import Outcome, check, tensors
from expecttest import TestCase


def rows(outcome: Outcome) -> str:
    """The rewritten graph, a line a node; inner graphs after their own."""
    text = []
    for name, gm in outcome.graphs[0].named_modules():
        if isinstance(gm, torch.fx.GraphModule):
            text += [f"# {name}"] if name else []
            for node in gm.graph.nodes:
                if node.op == "placeholder":
                    text.append(str(node.name))
                    continue
                target = (
                    node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
                )
                told = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
                text.append(
                    f"{node.name} = {target}({', '.join(told)})" if node.op != "output" else f"return {node.args[0]}"
                )
    return "\n".join(text)


class Golden(TestCase):
    def assert_graph(self, fn: Callable[..., Any], inputs: list[torch.Tensor], expected: str, **about: Any) -> None:
        self.assertExpectedInline(rows(check(fn, *inputs, **about)), expected, skip=1)

    def test_a_proved_mask_and_grouped_heads(self) -> None:
        def llama(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            i, j = torch.arange(6)[None, None, :, None], torch.arange(6)[None, None, None, :]
            bias = torch.where((j <= i).expand(2, -1, 6, 6), torch.tensor(0.0), torch.finfo(torch.float32).min)
            k = k[:, :, None, :, :].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
            v = v[:, :, None, :, :].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
            weights = torch.matmul(q, k.transpose(2, 3)) * 0.25 + bias
            weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            weights = F.dropout(weights, p=0.0, training=False)
            return torch.matmul(weights, v).transpose(1, 2).contiguous().reshape(2, 6, -1)

        self.assert_graph(
            llama,
            tensors((2, 4, 6, 8), (2, 2, 6, 8), (2, 2, 6, 8)),
            """\
l_k_
l_v_
l_q_
scaled_dot_product_attention = scaled_dot_product_attention(l_q_, l_k_, l_v_, scale=0.25, is_causal=True, enable_gqa=True)
transpose_1 = transpose(scaled_dot_product_attention, 1, 2)
contiguous = contiguous(transpose_1)
reshape_2 = reshape(contiguous, 2, 6, -1)
return (reshape_2,)""",
        )

    def test_a_bias_and_padding(self) -> None:
        def t5(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, keep: torch.Tensor
        ) -> torch.Tensor:
            scores = torch.matmul(q, k.transpose(3, 2)) + bias
            scores = scores.masked_fill(keep[:, None, None, :] < 0, float("-inf"))
            return torch.matmul(scores.float().softmax(-1).type_as(scores), v)

        self.assert_graph(
            t5,
            tensors((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), (1, 3, 5, 5), (2, 5)),
            """\
l_k_
l_q_
l_bias_
l_keep_
l_v_
getitem = getitem(l_keep_, (slice(None, None, None), None, None, slice(None, None, None)))
lt = lt(getitem, 0)
select = select(lt, 2, 0)
select_1 = select(select, 1, 0)
unsqueeze = unsqueeze(select_1, 1)
unsqueeze_1 = unsqueeze(unsqueeze, 2)
eq = eq(unsqueeze_1, 0)
any_1 = any(eq, -1, True)
logical_not = logical_not(any_1)
logical_or = logical_or(eq, logical_not)
select_2 = select(l_bias_, 0, 0)
where = where(logical_or, select_2, -inf)
detach = detach(where)
amax = amax(detach, -1, True)
abs_1 = abs(amax)
gt = gt(abs_1, 64.0)
ge = ge(abs_1, 1e+18)
lt_1 = lt(abs_1, 67108864.0)
logical_or_1 = logical_or(lt_1, ge)
logical_and = logical_and(gt, logical_or_1)
where_1 = where(logical_and, amax, 0.0)
sub = sub(where, where_1)
masked_fill_1 = masked_fill(l_q_, ge, 0.0)
to = to(sub, torch.float32)
scaled_dot_product_attention = scaled_dot_product_attention(masked_fill_1, l_k_, l_v_, scale=1.0, attn_mask=to)
masked_fill_2 = masked_fill(scaled_dot_product_attention, logical_not, nan)
contiguous = contiguous(masked_fill_2)
return (contiguous,)""",
        )

    def test_a_packed_projection_in_einsum(self) -> None:
        def packed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            q, k, v = F.linear(x, w).view(2, 5, 3, 2, 4).unbind(2)
            weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
            return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)

        self.assert_graph(
            packed,
            tensors((2, 5, 8), (24, 8)),
            """\
l_x_
l_w_
linear = linear(l_x_, l_w_)
view = view(linear, 2, 5, 3, 2, 4)
select = select(view, 2, 0)
permute = permute(select, 0, 2, 1, 3)
select_1 = select(view, 2, 1)
permute_1 = permute(select_1, 0, 2, 1, 3)
select_2 = select(view, 2, 2)
permute_2 = permute(select_2, 0, 2, 1, 3)
scaled_dot_product_attention = scaled_dot_product_attention(permute, permute_1, permute_2, scale=0.5)
permute_3 = permute(scaled_dot_product_attention, 0, 2, 1, 3)
flatten = flatten(permute_3, 2)
return (flatten,)""",
        )

    def test_a_module_that_is_one_node(self) -> None:
        class SelfAttention(torch.nn.MultiheadAttention):
            def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return super().forward(x, x, x, need_weights=self.needs)[0]

        for needs in (True, False):
            torch.manual_seed(0)
            module = SelfAttention(8, 2, batch_first=True)
            module.needs = needs
            outcome = check(module, *tensors((2, 5, 8)), grad=True)
            assert [(s.matched, s.route) for s in outcome.sites] == [(True, "sdpa")], outcome.sites

    def test_nothing_is_left_of_the_node(self) -> None:
        attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def mha(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            w, b, o, c = weights
            return F.multi_head_attention_forward(
                x, x, x, 8, 2, w, b, None, None, False, 0.0, o, c, training=False, need_weights=False
            )[0]

        parameters = [p.detach() for p in attention.parameters()]
        outcome = check(mha, tensors((5, 2, 8))[0], *parameters)
        assert [(s.matched, s.route) for s in outcome.sites] == [(True, "sdpa")], outcome.sites

    def test_a_checkpointed_body(self) -> None:
        def body(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return (q @ k.mT * 0.5).softmax(-1) @ v

        def checkpointed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(body, q, k, v, use_reentrant=False)

        inputs = tensors((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4), grad=True)
        self.assert_graph(
            checkpointed,
            inputs,
            """\
l_q_
l_k_
l_v_
getattr_1 = getattr(l_k_, mT)
wrap_body_0 = wrap_body_0()
tag_activation_checkpoint = tag_activation_checkpoint(wrap_body_0, l_q_, getattr_1, l_v_, use_reentrant=False)
getitem = getitem(tag_activation_checkpoint, 0)
return (getitem,)
# wrap_body_0
l_q_
getattr_1
l_v_
permute = permute(getattr_1, 0, 1, 3, 2)
scaled_dot_product_attention = scaled_dot_product_attention(l_q_, permute, l_v_, scale=0.5)
contiguous = contiguous(scaled_dot_product_attention)
return (contiguous,)""",
            grad=True,
        )
