"""Text generation of transformers through the backend: the same tokens, and no compilation for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hugging_face import DECODER, VOCABULARY
from torch import Tensor, fx
from torch._dynamo.utils import counters

import xfcompile
from xfcompile import Report, SiteReport

Through = Literal["graph", "xformers", "inductor"]
"""What runs the compiled graphs: themselves, rewritten; Inductor's code of the rewritten ones, or of the user's own."""

BATCH, PROMPT, TOKENS, LAYERS, WINDOW = 2, 10, 24, 2, 8
SPREAD = {"initializer_range": 0.3}
"""Weights wide enough that the next token depends on the text; with the usual ones a few tokens repeat."""
GPT2 = dict(n_embd=64, n_layer=LAYERS, n_head=4, n_positions=128)
T5 = dict(
    d_model=64, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0, initializer_factor=4.0
)
ENDLESS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
"""No token ends the text: all runs are of the same length."""

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, **ENDLESS, **SPREAD}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, **ENDLESS, **SPREAD, "sliding_window": WINDOW}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, **ENDLESS, **SPREAD}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, **ENDLESS}),
}
BOTH = [(name, attention) for name in MODELS for attention in ("sdpa", "eager")]
ATTENTIONS = {"llama": LAYERS, "mistral": LAYERS, "gpt2": LAYERS, "t5": 2 * LAYERS}
"""In one graph of a decoder: T5's layers attend to the text so far and to the encoder's."""


COMPILATIONS = {"llama": 3, "mistral": 3, "gpt2": 3, "t5": 4}
"""For the prompt, for the first step, for all others, whose lengths are symbols; T5's encoder is a graph of its own."""
PROMPT_MASKS = {
    "llama": "causal & key padding",
    "mistral": f"causal & key padding & window({WINDOW})",
    "gpt2": "causal & key padding",
    "t5": "none",  # the decoder's prompt is one token
    "cross": "key padding",
}
CAP = 20.0


def _attentions(report: Report) -> list[SiteReport]:
    return [site for site in report.sites if site.family == "attention"]


@dataclass(frozen=True)
class Generated:
    """The tokens that eager and compiled generation gave, how often was compiled, and what of the sites was said."""

    eager: Tensor
    compiled: Tensor
    compilations: int
    report: Report

    def sites(self, module: str) -> list[SiteReport]:
        """The sites of one module, in the order of compilation: of the prompt, of the steps."""
        return [site for site in self.attentions if site.module == module]

    @property
    def attentions(self) -> list[SiteReport]:
        return _attentions(self.report)

    @property
    def modules(self) -> list[str]:
        return sorted({site.module or "" for site in self.attentions})


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


def _generated(model: Any, name: str, backend: Any, static: bool, more: dict[str, Any]) -> Any:
    """What a model generates whose steps are compiled: by transformers itself with a static cache, else by its user."""
    from transformers import CompileConfig

    if static:
        config = CompileConfig(backend=backend, mode=None)
        # Without it transformers compiles on GPUs and their like alone.
        config._compile_all_devices = True
        return model.generate(**more, compile_config=config)
    model.forward = torch.compile(model.forward, backend=backend)
    if name == "t5":
        model.encoder.forward = torch.compile(model.encoder.forward, backend=backend)
    return model.generate(**more)


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
    torch._dynamo.reset()
    model, report, seen = _model(name, attention), Report(), list[fx.GraphModule]()
    backend = _counting(through, report, seen)
    more: dict[str, Any] = {**_prompt(name, padded), "max_new_tokens": tokens, "do_sample": False}
    if static:
        more["cache_implementation"] = "static"
    eager = model.generate(**more)
    with xfcompile.collect() as collected:
        compiled = _generated(model, name, backend, static, more)
    report.extend(collected)
    return Generated(eager, compiled, len(seen), report)


def _same(generated: Generated, tokens: int = TOKENS) -> None:
    assert generated.compiled.shape[1] >= tokens
    assert len(generated.eager.unique()) > 5, "text that hardly changes says nothing"
    assert torch.equal(generated.eager, generated.compiled)
    assert not generated.report.failures


def _slow(*parameters: Any) -> Any:
    return pytest.param(*parameters, marks=pytest.mark.slow)


def _unless(quick: Sequence[tuple[str, str]]) -> list[Any]:
    """All models and attentions, slow but for those named."""
    return [model if model in quick else _slow(*model) for model in BOTH]


QUICK = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("mistral", "sdpa"),
    ("mistral", "eager"),
    ("gpt2", "sdpa"),
    ("t5", "sdpa"),
]


@pytest.mark.parametrize("name, attention", _unless(QUICK))
def test_growing_cache_gives_the_same_tokens(name: str, attention: str) -> None:
    _same(_generate(name, attention))


@pytest.mark.parametrize("name, attention", _unless([("llama", "sdpa")]))
def test_growing_cache_without_padding(name: str, attention: str) -> None:
    generated = _generate(name, attention, padded=False)
    _same(generated)
    assert generated.compilations == COMPILATIONS[name]


@pytest.mark.parametrize("name, attention", _unless(QUICK))
def test_growing_cache_compiles_for_the_prompt_the_first_step_and_all_others(name: str, attention: str) -> None:
    assert _generate(name, attention).compilations == COMPILATIONS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name, attention", BOTH)
def test_inductor_compiles_the_growing_cache_as_often(name: str, attention: str) -> None:
    ours, inductors = (_generate(name, attention, through=through) for through in ("xformers", "inductor"))
    _same(ours)
    assert ours.compilations == ours.report.graphs <= inductors.compilations


@pytest.mark.parametrize("name, attention", _unless(QUICK))
def test_attention_of_the_prompt_and_of_the_first_step_is_matched(name: str, attention: str) -> None:
    generated = _generate(name, attention)
    decoder = [m for m in generated.modules if name != "t5" or m.startswith("decoder")]
    assert len(decoder) == ATTENTIONS[name]
    for module in decoder:
        sites = generated.sites(module)
        assert len(sites) == 3, "the prompt, the first step, all others"
        prompt, step, _ = sites
        assert prompt.matched and step.matched
        assert prompt.route == "sdpa"
        assert prompt.mask == PROMPT_MASKS[name if "EncDec" not in module else "cross"]


@pytest.mark.parametrize("name, attention", _unless(QUICK))
def test_attention_of_later_steps_is_matched(name: str, attention: str) -> None:
    generated = _generate(name, attention)
    later = [generated.sites(m)[-1] for m in generated.modules]
    assert [site.route for site in later] == ["sdpa"] * len(later), {site.reason for site in later}


@pytest.mark.parametrize("name, attention", _unless([m for m in QUICK if m != ("mistral", "eager")]))
def test_static_cache_is_compiled_as_often_for_many_tokens_as_for_few(name: str, attention: str) -> None:
    few, many = (_generate(name, attention, static=True, tokens=tokens) for tokens in (8, TOKENS))
    _same(few, 8)
    _same(many)
    # Mistral's window is a number that changes until it is full.
    assert few.compilations == many.compilations == (2 if name == "mistral" else 1)
    assert len(many.modules) == ATTENTIONS[name]
    assert len(many.attentions) == ATTENTIONS[name] * many.compilations
    assert {(site.matched, site.route) for site in many.attentions} == {(True, "sdpa")}
    # transformers makes the mask outside of the graph: booleans for SDPA, floats, which are a bias, for eager. T5's
    # eager masks are read as padding all the same.
    read = "key padding" if attention == "sdpa" or name == "t5" else "none"
    assert {site.mask for site in many.attentions} == {read}


@pytest.mark.parametrize("name, attention", _unless([("llama", "eager")]))
def test_static_cache_through_inductor(name: str, attention: str) -> None:
    generated = _generate(name, attention, static=True, through="xformers")
    _same(generated)
    assert generated.compilations == generated.report.graphs == (2 if name == "mistral" else 1)


@pytest.mark.parametrize("name, attention", [("llama", "sdpa"), _slow("llama", "eager"), _slow("mistral", "sdpa")])
def test_static_cache_given_to_a_forward_that_the_user_compiled(name: str, attention: str) -> None:
    from transformers import StaticCache

    for tokens in (8, TOKENS):
        torch._dynamo.reset()
        model, report, seen = _model(name, attention), Report(), list[fx.GraphModule]()

        def generate(model: Any = model, tokens: int = tokens) -> Tensor:
            cache = StaticCache(config=model.config, max_cache_len=PROMPT + TOKENS)
            more = {"max_new_tokens": tokens, "do_sample": False, "past_key_values": cache, "disable_compile": True}
            return model.generate(**_prompt(name, padded=True), **more)

        eager = generate()
        model.forward = torch.compile(model.forward, backend=_counting("graph", report, seen))
        _same(Generated(eager, generate(), len(seen), report), tokens)
        # For the prompt and for a step; Mistral's window is a number that changes until it is full.
        assert len(seen) <= (2 if name == "llama" else 3)
        assert {(site.matched, site.route) for site in _attentions(report)} == {(True, "sdpa")}


@pytest.mark.parametrize("name", ["llama", _slow("gpt2"), _slow("t5")])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_tokens_by_our_decoding_kernels(name: str, static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, where a step's attention is split over keys however few there are."""
    from xfcompile.kernels.attention import launch_decode, programs

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch_decode, "MANY_KEYS", 1)
    for program in programs.known.values():
        program.calls.clear()
    launches: list[int] = []
    launched = launch_decode.Pair.__call__

    def counted(self: launch_decode.Pair, *args: Any) -> Any:
        launches.append(self.splits)
        return launched(self, *args)

    monkeypatch.setattr(launch_decode.Pair, "__call__", counted)
    graphs: list[fx.GraphModule] = []
    report = Report()

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        report.extend(xfcompile.rewrite(gm, examples, {"strict": True, "routes": {"attention": "triton"}}))
        return gm

    model, tokens = _model(name, "sdpa"), 8
    more: dict[str, Any] = {**_prompt(name, padded=True), "max_new_tokens": tokens, "do_sample": False}
    if static:
        more["cache_implementation"] = "static"
    eager = model.generate(**more)
    compiled = _generated(model, name, backend, static, more)
    assert torch.equal(eager, compiled)
    assert {(site.matched, site.route) for site in _attentions(report)} == {(True, "triton")}
    # The first token is the prompt's, which transformers does not compile where the cache is static.
    assert len(launches) >= (tokens - 1) * LAYERS
    assert len(graphs) == (1 if static else 3)


def test_one_head_of_keys_in_a_compiled_step_by_the_backends_name() -> None:
    """With the mode that transformers asks for by itself."""
    from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {**DECODER, **ENDLESS, **SPREAD, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM._from_config(LlamaConfig(**fields), attn_implementation="sdpa").eval()
    more: dict[str, Any] = {**_prompt("llama", padded=True), "max_new_tokens": 8, "do_sample": False}
    eager = model.generate(**more, cache_implementation="static")
    config = CompileConfig(backend="xformers")
    assert config.mode == "reduce-overhead"
    config._compile_all_devices = True
    with xfcompile.collect() as report:
        compiled = model.generate(**more, cache_implementation="static", compile_config=config)
    assert torch.equal(eager, compiled)
    assert report.graphs == 1
    assert [(site.route, site.mask) for site in _attentions(report)] == [("sdpa", "key padding")]


def test_lengths_of_keys_and_values_that_sdpa_alone_compares() -> None:
    report = Report()
    fn = F.scaled_dot_product_attention
    compiled = torch.compile(lambda q, k, v: fn(q, k, v), backend=_counting("graph", report, []))
    for length in (5, 6):
        q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 4, length, 16), torch.randn(2, 4, length, 16)
        torch.testing.assert_close(compiled(q, k, v), fn(q, k, v))
    assert [site.matched for site in _attentions(report)] == [True, True], report


def _newest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to the last eight keys, by a number that is computed from a symbolic length."""
    first = max(k.shape[-2] - WINDOW, 0)
    return (q @ k.mT).masked_fill(torch.arange(k.shape[-2]) < first, float("-inf")).softmax(-1) @ v


def test_a_mask_by_the_larger_of_two_sizes_is_given_to_sdpa() -> None:
    report = Report()
    compiled = torch.compile(_newest, backend=_counting("graph", report, []), dynamic=True)
    for length in (5, 12):
        q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 4, length, 16), torch.randn(2, 4, length, 16)
        torch.testing.assert_close(compiled(q, k, v), _newest(q, k, v))
    assert [site.route for site in _attentions(report)] == ["sdpa"], report


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (CAP * torch.tanh(q @ k.mT * scale / CAP)).softmax(-1) @ v


def _scaled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


@pytest.mark.parametrize(
    "fn, route",
    [
        (_soft_capped, "inductor"),
        (_scaled, "sdpa"),
    ],
)
def test_one_compilation_for_all_lengths_batches_and_scales(fn: Callable[..., Tensor], route: str) -> None:
    counters.clear()
    with xfcompile.collect() as report:
        compiled = torch.compile(fn, backend=xfcompile.xformers, dynamic=True, options={"strict": True})
        for batch, queries, keys, scale in ((2, 5, 7, 0.3), (3, 9, 12, 0.25), (5, 17, 33, 0.2), (2, 40, 6, 0.5)):
            q = torch.randn(batch, 4, queries, 16)
            k, v = torch.randn(batch, 4, keys, 16), torch.randn(batch, 4, keys, 16)
            exact = fn(q.double(), k.double(), v.double(), scale)
            eager, ours = ((f(q, k, v, scale) - exact).abs().max() for f in (fn, compiled))
            assert ours <= 2 * eager + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert counters["stats"]["unique_graphs"] == 1
    assert {(site.matched, site.route) for site in _attentions(report)} == {(True, route)}
