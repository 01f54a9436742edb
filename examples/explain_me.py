"""A small language model in plain PyTorch, with an attention that no library has a kernel for, to be explained.

    python -m xfcompile explain examples/explain_me.py --html page.html

Every layer soft-caps its scores and slopes them by distance (ALiBi), the odd ones within a window; padded tokens are
masked. The pooling at the end has a softmax over the wrong axis, which no attention has. On a CPU what SDPA cannot say
is left to Inductor; with TRITON_INTERPRET=1 the generated kernels run there too, in Triton's interpreter, and the page
has them.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH, WIDTH, HEADS, WINDOW, CAP = 320, 64, 4, 96, 30.0


class Attention(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        scores = CAP * torch.tanh(scores / CAP)
        place = torch.arange(x.shape[1], device=x.device)
        distance = place[:, None] - place[None, :]
        scores = scores - self.slopes[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, float("-inf"))
        if self.window is not None:
            scores = scores.masked_fill(distance >= self.window, float("-inf"))
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(window), GatedMLP()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), padding)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList([Block(WINDOW if n % 2 else None) for n in range(layers)])
        self.probe = nn.Parameter(torch.randn(8, WIDTH))

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x, padding)
        return (self.probe @ x.transpose(1, 2)).softmax(1) @ x  # of 8 probes that compete for each token


def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    tokens = torch.randint(256, (1, LENGTH))
    padding = torch.arange(LENGTH)[None] >= LENGTH - 20
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    options = {"routes": {"attention": "triton"}} if interpreted else {}
    compiled = torch.compile(model, backend="xformers", options=options)
    with torch.no_grad():
        # The keys of the last tokens are padding: their own rows see those before them.
        difference = (compiled(tokens, padding) - model(tokens, padding)).abs().max()
    print(f"largest difference to eager: {difference:.1e}")


if __name__ == "__main__":
    main()
