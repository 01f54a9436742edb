"""Attention as well-known code bases write it by hand, retold here in a few lines each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import Entry, Program

B, S, E, H = 2, 24, 64, 4
D = E // H


class NanoGPT(nn.Module):
    """nanoGPT: one packed projection, a lower-triangular buffer compared with zero, `masked_fill(-inf)`."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.attn_dropout = nn.Dropout(0.0)
        self.register_buffer("bias", torch.tril(torch.ones(128, 128)).view(1, 1, 128, 128))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(E, dim=2)
        q, k, v = (y.view(b, t, H, c // H).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(b, t, c))


class Annotated(nn.Module):
    """The Annotated Transformer: a scale by division, an integer mask with -1e9, the weights returned and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(E, E) for _ in range(4))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(query.size(-1))
        scores = scores.masked_fill(mask == 0, -1e9)
        p_attn = scores.softmax(dim=-1)
        return torch.matmul(p_attn, value), p_attn

    def forward(self, x: Tensor) -> Tensor:
        size = x.size(1)
        mask = torch.triu(torch.ones(1, size, size), diagonal=1).type(torch.uint8) == 0
        query, key, value = (lin(x).view(x.size(0), -1, H, D).transpose(1, 2) for lin in list(self.linears)[:3])
        y, _ = self.attention(query, key, value, mask.unsqueeze(1))
        return self.linears[-1](y.transpose(1, 2).contiguous().view(x.size(0), -1, H * D))


class MetaLlama(nn.Module):
    """Llama as first published: complex rotary numbers, grouped heads by expand, a `triu(-inf)` mask, fp32 softmax."""

    KV = 2

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(99, E)
        self.wq, self.wo = nn.Linear(E, E, bias=False), nn.Linear(E, E, bias=False)
        self.wk, self.wv = nn.Linear(E, self.KV * D, bias=False), nn.Linear(E, self.KV * D, bias=False)
        freqs = 1.0 / (10000.0 ** (torch.arange(0, D, 2).float() / D))
        angles = torch.outer(torch.arange(128).float(), freqs)
        # Kept as real numbers: `.double()` would drop a complex buffer's imaginary part.
        self.register_buffer("angles", angles)

    def rotate(self, x: Tensor, freqs_cis: Tensor) -> Tensor:
        x_ = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(x_ * freqs_cis[None, :, None]).flatten(3).type_as(x)

    def forward(self, tokens: Tensor) -> Tensor:
        b, s = tokens.shape
        h = self.tok_embeddings(tokens)
        freqs_cis = torch.polar(torch.ones_like(self.angles[:s]), self.angles[:s])
        mask = torch.full((s, s), float("-inf"), device=tokens.device)
        mask = torch.triu(mask, diagonal=1)
        mask = torch.hstack([torch.zeros((s, 0), device=tokens.device), mask]).type_as(h)
        xq = self.rotate(self.wq(h).view(b, s, H, D), freqs_cis).transpose(1, 2)
        xk = self.rotate(self.wk(h).view(b, s, self.KV, D), freqs_cis)
        xv = self.wv(h).view(b, s, self.KV, D)
        keys, values = (
            x[:, :, :, None, :].expand(b, s, self.KV, H // self.KV, D).reshape(b, s, H, D).transpose(1, 2)
            for x in (xk, xv)
        )
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(D)
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(b, s, -1))


class FairseqAttention(nn.Module):
    """fairseq: time first, q scaled in place, heads folded into the batch, `+=` mask, fp32 softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(E, E) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        t, b, c = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q *= D**-0.5
        q, k, v = (y.contiguous().view(-1, b * H, D).transpose(0, 1) for y in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))
        mask = torch.triu(torch.zeros([t, t]).float().fill_(float("-inf")).type_as(x), 1)
        weights += mask.unsqueeze(0)
        weights_float = F.softmax(weights, dim=-1, dtype=torch.float32)
        probs = F.dropout(weights_float.type_as(weights), p=0.1, training=self.training)
        attn = torch.bmm(probs, v).transpose(0, 1).contiguous().view(t, b, c)
        weights_float.view(b, H, t, -1)  # what it returns on request; unused here
        return self.out_proj(attn)


class TriangleAttention(nn.Module):
    """OpenFold: rank-5 scores, a padding bias and a pair bias added in place, the output gated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(E), nn.Linear(E, H, bias=False)
        self.q, self.k, self.v = (nn.Linear(E, E, bias=False) for _ in range(3))
        self.g, self.o = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.layer_norm(x)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
        triangle_bias = self.linear(x).permute(0, 3, 1, 2).unsqueeze(-4)
        q, k, v = (f(x).view(*x.shape[:-1], H, -1).transpose(-2, -3) for f in (self.q, self.k, self.v))
        q = q / math.sqrt(D)
        a = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
        for bias in (mask_bias, triangle_bias):
            a += bias
        a = F.softmax(a, dim=-1)
        o = torch.matmul(a, v).transpose(-2, -3)
        o = o * torch.sigmoid(self.g(x)).view(*x.shape[:-1], H, -1)
        return self.o(o.reshape(*o.shape[:-2], -1))


class MegatronCore(nn.Module):
    """Megatron's core attention: `baddbmm` into an empty buffer, an in-place fill of a view of it, length first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        s, b, _ = x.shape
        query, key, value = self.qkv(x).view(s, b, H, 3 * D).split(D, dim=3)
        query, key = query.reshape(s, b * H, -1), key.reshape(s, b * H, -1)
        buffer = torch.empty(b * H, s, s, dtype=x.dtype, device=x.device)
        scores = torch.baddbmm(
            buffer, query.transpose(0, 1), key.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(D)
        )
        scores = scores.view(b, H, s, s)
        scores.masked_fill_(attention_mask, -10000.0)
        probs = nn.Softmax(dim=-1)(scores)
        value = value.reshape(s, b * H, -1)
        context = torch.bmm(probs.view(b * H, s, -1), value.transpose(0, 1)).view(b, H, s, D)
        return self.dense(context.permute(2, 0, 1, 3).contiguous().view(s, b, E))


class TiedRows(nn.Module):
    """MSA Transformer's rows: one attention shared by all rows, the product contracts rows and features."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:-1], H, D) for f in (self.q, self.k, self.v))
        q *= D**-0.5 / math.sqrt(x.shape[0])
        probs = torch.einsum("rinhd,rjnhd->hnij", q, k).softmax(-1)
        return torch.einsum("hnij,rjnhd->rinhd", probs, v).contiguous().flatten(-2)


class TalkingHeads(nn.Module):
    """CaiT and its kin: heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(E, 3 * E)
        self.before, self.after = nn.Parameter(torch.randn(H, H)), nn.Parameter(torch.randn(H, H))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * D**-0.5
        attn = torch.einsum("b h i j, h g -> b g i j", dots, self.before).softmax(dim=-1)
        attn = torch.einsum("b h i j, h g -> b g i j", attn, self.after)
        return torch.einsum("b h i j, b h j d -> b h i d", attn, v).transpose(1, 2).reshape(b, n, -1)


class DocumentsWindow(nn.Module):
    """Packed documents under a sliding window, grouped heads by `repeat_interleave`, names of axes only in einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, H, D)
        k, v = self.kv(x).view(b, n, 2, 2, D).unbind(2)
        k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
        position = torch.arange(n, device=x.device)
        distance = position[:, None] - position[None, :]
        keep = (document[:, :, None] == document[:, None, :]) & (distance >= 0) & (distance < 8)
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k).mul(D**-0.5)
        scores = torch.where(keep[:, None], scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bhqk,bkhc->bqhc", torch.softmax(scores, -1), v).flatten(2)


class EinxMasked(nn.Module):
    """alphafold3-pytorch: einsums with spaces, a bias, and a mask by einx, one call to Dynamo, which the reading sees
    through like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(E, E), nn.Linear(E, 2 * E), nn.Linear(E, E)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        import einx

        q, k, v = (
            t.unflatten(-1, (H, D)).transpose(1, 2) for t in (self.to_q(x) * D**-0.5, *self.to_kv(x).chunk(2, -1))
        )
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) + bias
        sim = einx.where("b j, b h i j, -> b h i j", mask, sim, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _with(module: Callable[[], nn.Module], *inputs: Callable[[], Any]) -> Callable[[], Program]:
    def make() -> Program:
        built = module()
        return Program(built, tuple(given() for given in inputs))

    return make


def _rows() -> Tensor:
    return torch.randn(B, S, E)


def _pair_mask() -> Tensor:
    mask = torch.ones(B, 10, 10)
    mask[1, :, 7:] = 0
    return mask


def _after() -> Tensor:
    return torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)


def _entries(name: str, make: Callable[[], Program], attentions: int, declined: int = 0) -> tuple[Entry, ...]:
    """The same program in evaluation and in training."""
    return (
        Entry(name, make, attentions, declined, needs=()),
        Entry(f"{name}_train", make, attentions, declined, train=True, needs=()),
    )


ENTRIES = (
    *_entries("nanogpt", _with(NanoGPT, _rows), 1),
    *_entries("annotated_transformer", _with(Annotated, _rows), 1),
    *_entries("meta_llama", _with(MetaLlama, lambda: torch.randint(0, 99, (B, S))), 1),
    Entry("fairseq", _with(FairseqAttention, _rows), 1, needs=()),
    *_entries("openfold_triangle", _with(TriangleAttention, lambda: torch.randn(B, 10, 10, E), _pair_mask), 1),
    *_entries("megatron_core", _with(MegatronCore, lambda: torch.randn(S, B, E), _after), 1),
    *_entries(
        "documents_window",
        _with(DocumentsWindow, _rows, lambda: (torch.arange(S)[None] // torch.tensor([[10], [7]]))), 1,
    ),
    Entry("msa_tied_rows", _with(TiedRows, lambda: torch.randn(3, S, B, E)), 0, declined=1, needs=()),
    Entry(
        "alphafold3_einx",
        _with(EinxMasked, _rows, lambda: torch.ones(B, S, dtype=torch.bool), lambda: torch.randn(B, H, S, S)),
        1, needs=("einx",),
    ),
    Entry("talking_heads", _with(TalkingHeads, _rows), 0, declined=1, needs=()),
)  # fmt: skip
