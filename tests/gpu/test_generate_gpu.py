"""Text generation on a CUDA device: transformers' own compiled step through the backend, in CUDA graphs."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from forcing import forced
from torch import Tensor
from torch._dynamo.utils import counters

import xfcompile

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, PROMPT, TOKENS, VOCABULARY, LAYERS = 2, 10, 24, 99, 2


def model(dtype: torch.dtype, attention: str, **more: Any) -> Any:
    """A small Llama with two heads of keys for four of queries, whose next token depends on the text.

    Weights are so wide that tokens are told apart by much, but in bf16, where roundings then grow a hundredfold.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        initializer_range=0.3 if dtype == torch.float32 else 0.05, **more,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return made.to("cuda", dtype).eval()


def prompt() -> dict[str, Tensor]:
    """Two texts, the second shorter by its beginning."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda()}


def captured() -> int:
    """How many CUDA graphs Inductor has recorded since Dynamo was reset; asking counts as one."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else manager.new_graph_id().id


def generated(llama: Any, tokens: int, **more: Any) -> Tensor:
    return llama.generate(
        **prompt(), max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True, **more
    )


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    gc.collect()


def check_text(ours: Any, eager: Any, dtype: torch.dtype, attention: str) -> None:
    """All tokens are equal in fp32. In bf16 texts drift apart: they are as exact as eager's."""
    for text in (ours, eager):
        assert len(text.sequences.unique()) > 5, "text that hardly changes says nothing"
    if dtype == torch.float32:
        assert torch.equal(ours.sequences, eager.sequences)
    else:
        forced(model(dtype, attention), prompt(), ours).check()


@pytest.mark.parametrize("mode", ["reduce-overhead", None])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_static_cache_of_transformers_own_compiled_step(dtype: torch.dtype, attention: str, mode: str | None) -> None:
    llama = model(dtype, attention)
    eager = generated(llama, TOKENS, cache_implementation="static", disable_compile=True)
    config = transformers.CompileConfig(backend=xfcompile.xformers, mode=mode, options=None)
    with xfcompile.collect() as report:
        ours = generated(llama, TOKENS, cache_implementation="static", compile_config=config)
        compilations = report.graphs
        generated(llama, 2 * TOKENS, cache_implementation="static", compile_config=config)
    check_text(ours, eager, dtype, attention)
    assert compilations == 1, "one step is every step"
    # A longer text has a longer cache, another static size: at most one compilation more.
    assert report.graphs <= 2
    assert not report.failures
    attentions = [site for site in report.sites if site.family == "attention"]
    assert len(attentions) == LAYERS * report.graphs
    assert all(site.matched for site in attentions)
    if mode == "reduce-overhead":
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert captured() > 0


@pytest.mark.skipif(
    "xformers" not in torch._dynamo.list_backends(), reason="the package is not installed, so its name is not known"
)
def test_the_backends_name_in_a_compile_config() -> None:
    llama = model(torch.float32, "sdpa")
    eager = generated(llama, TOKENS, cache_implementation="static", disable_compile=True)
    config = transformers.CompileConfig(backend="xformers")
    assert config.mode == "reduce-overhead"
    with xfcompile.collect() as report:
        ours = generated(llama, TOKENS, cache_implementation="static", compile_config=config)
    check_text(ours, eager, torch.float32, "sdpa")
    assert report.graphs == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert captured() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_growing_cache_of_a_forward_that_the_user_compiled(dtype: torch.dtype, attention: str) -> None:
    llama = model(dtype, attention)
    eager = generated(llama, TOKENS)
    with xfcompile.collect() as report:
        llama.forward = torch.compile(llama.forward, backend=xfcompile.xformers, options={"strict": True})
        ours = generated(llama, TOKENS)
    check_text(ours, eager, dtype, attention)
    assert report.graphs == 3, "for the prompt, the first step, and all others"


def test_static_cache_of_a_forward_that_the_user_compiled_in_graphs() -> None:
    llama = model(torch.float32, "sdpa")

    def cache() -> Any:
        """Made before the prompt: what the prompt's graph makes is that graph's own memory, to be written over by its
        next run, with Inductor alone too (transformers' `StaticLayer.lazy_initialization` says that users must)."""
        made = transformers.StaticCache(config=llama.config, max_cache_len=PROMPT + TOKENS)
        made.early_initialization(BATCH, 2, 64, torch.float32, torch.device("cuda"))
        return made

    eager = generated(llama, TOKENS, past_key_values=cache(), disable_compile=True)
    with xfcompile.collect() as report:
        llama.forward = torch.compile(llama.forward, backend=xfcompile.xformers, mode="reduce-overhead")
        ours = generated(llama, TOKENS, past_key_values=cache(), disable_compile=True)
    check_text(ours, eager, torch.float32, "sdpa")
    assert report.graphs == 2, "for the prompt, and for all steps"
    assert captured() > 0
