"""Text generation of transformers through the backend: the same tokens, and no compilation for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch
from hugging_face import DECODER, VOCABULARY
from torch import Tensor, fx

import xfcompile
from xfcompile import Report, SiteReport

Through = Literal["graph", "xformers", "inductor"]
"""What runs the compiled graphs: themselves, rewritten; Inductor's code of the rewritten ones, or of the user's own."""

BATCH, PROMPT, TOKENS, LAYERS, WINDOW = 2, 10, 24, 2, 8
SPREAD = {"initializer_range": 0.3}
"""Weights wide enough that the next token depends on the text; with the usual ones a few tokens repeat."""
GPT2 = dict(n_embd=64, n_layer=LAYERS, n_head=4, n_positions=128)
T5 = dict(
    d_model=64, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0, initializer_factor=8.0
)
ENDLESS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
"""No token ends the text: all runs are of the same length."""

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, **ENDLESS, **SPREAD}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, **ENDLESS, **SPREAD, "sliding_window": WINDOW}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **ENDLESS, **SPREAD}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, **ENDLESS, "tie_word_embeddings": False}),
}
BOTH = [(name, attention) for name in MODELS for attention in ("sdpa", "eager")]
ATTENTIONS = {"llama": LAYERS, "mistral": LAYERS, "gpt2": LAYERS, "t5": 2 * LAYERS}
"""In one graph of a decoder: T5's layers attend to the text so far and to the encoder's."""


@dataclass(frozen=True)
class Generated:
    """The tokens that eager and compiled generation gave, how often was compiled, and what of the sites was said."""

    eager: Tensor
    compiled: Tensor
    compilations: int
    report: Report

    def sites(self, module: str) -> list[SiteReport]:
        """The sites of one module, in the order of compilation: of the prompt, of the steps."""
        return [site for site in self.report.sites if site.module == module]

    @property
    def modules(self) -> list[str]:
        return sorted({site.module or "" for site in self.report.sites})


def _model(name: str, attention: str) -> Any:
    import transformers

    kind, config, fields = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**fields)
    return getattr(transformers, kind)._from_config(made, attn_implementation=attention).eval()


def _prompt(name: str, padded: bool) -> dict[str, Tensor]:
    """Two texts; padded, the second is shorter: by its beginning for a decoder, by its end for an encoder."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, PROMPT))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, slice(-4, None) if name == "t5" else slice(0, 4)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _counting(through: Through, report: Report, seen: list[fx.GraphModule]) -> Callable[..., Any]:
    def compiling(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        seen.append(gm)
        if through == "inductor":
            return compile_fx(gm, example_inputs)  # type: ignore[return-value]
        if through == "xformers":
            return xfcompile.xformers(gm, example_inputs, options={"strict": True})
        report.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True}))
        return gm

    return compiling


@cache
def _generate(
    name: str,
    attention: str,
    *,
    padded: bool = True,
    static: bool = False,
    tokens: int = TOKENS,
    through: Through = "graph",
) -> Generated:
    """Greedy generation, eager and compiled.

    static: with a cache of one size, for which transformers compiles the step itself, and only that. Otherwise with
    the growing one, for which users compile `forward`; the encoder's too, which `generate` calls by itself.
    """
    from transformers import CompileConfig

    torch._dynamo.reset()
    model, report, seen = _model(name, attention), Report(), list[fx.GraphModule]()
    backend = _counting(through, report, seen)
    more: dict[str, Any] = {**_prompt(name, padded), "max_new_tokens": tokens, "do_sample": False}
    if static:
        more["cache_implementation"] = "static"
    eager = model.generate(**more)
    with xfcompile.collect() as collected:
        if static:
            config = CompileConfig(backend=backend, mode=None)
            # Without it transformers compiles on GPUs and their like alone.
            config._compile_all_devices = True
            compiled = model.generate(**more, compile_config=config)
        else:
            model.forward = torch.compile(model.forward, backend=backend)
            if name == "t5":
                model.encoder.forward = torch.compile(model.encoder.forward, backend=backend)
            compiled = model.generate(**more)
    report.extend(collected)
    return Generated(eager, compiled, len(seen), report)


def _same(generated: Generated, tokens: int = TOKENS) -> None:
    assert generated.compiled.shape[1] >= tokens
    assert len(generated.eager.unique()) > tokens // 3, "text that hardly changes says nothing"
    assert torch.equal(generated.eager, generated.compiled)
    assert not generated.report.failures


UNPADDED_TOO = [(*model, True) for model in BOTH] + [
    pytest.param(*model, False, marks=() if model == ("llama", "sdpa") else pytest.mark.slow) for model in BOTH
]


@pytest.mark.parametrize("name, attention, padded", UNPADDED_TOO)
def test_growing_cache(name: str, attention: str, padded: bool) -> None:
    g = _generate(name, attention, padded=padded)
    print(g.compilations, g.report)
    for m in g.modules:
        print(m, [(s.matched, s.route, s.mask, s.reason) for s in g.sites(m)])
    _same(g)


@pytest.mark.parametrize("name, attention", BOTH)
def test_static(name: str, attention: str) -> None:
    few, many = (_generate(name, attention, static=True, tokens=n) for n in (8, TOKENS))
    for g in (few, many):
        print(g.compilations)
        for m in g.modules:
            print(m, [(s.matched, s.route, s.mask, s.reason) for s in g.sites(m)])
    _same(few, 8)
    _same(many)
