"""Training loops as people write them: checkpoints, autocast, accumulation, frozen weights, packed projections."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from step import OPTIONS, ROUTE, Launches, check, compiled, doubled, judge, numbers, qkv, step
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import xfcompile
from xfcompile.kernels.attention.backward_layout import Needs


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Soft-capped and causal, which SDPA cannot say; causal alone, which it can, is `causal`."""
    s = 5.0 * torch.tanh(q @ k.transpose(-2, -1) / (5.0 * math.sqrt(q.shape[-1])))
    future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(future, -math.inf).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    future = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(future, -math.inf).softmax(-1) @ v


PROGRAM: dict[str, Callable[..., Tensor]] = {"default": causal, "kernel": attention}


class Layer(nn.Module):
    """Self-attention over views of one packed projection."""

    def __init__(self, route: str, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.attend = heads, PROGRAM[route]
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, length, width))


def layer(route: str) -> Layer:
    torch.manual_seed(0)
    return Layer(route)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {f"gradient {n}": p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None}


def judged(module: nn.Module, ours: nn.Module, route: str, train: Callable[[nn.Module], None], sites: int = 1) -> None:
    """`train` leaves gradients in a module: ours, compiled, are compared with those of eager and of fp64."""
    report = xfcompile.Report()
    results = []
    usual = torch.get_default_dtype()
    for m, dtype in ((module, torch.float64), (module, torch.float32)):
        torch.set_default_dtype(dtype)
        try:
            m = copy.deepcopy(m).to(dtype)
            train(m)
        finally:
            torch.set_default_dtype(usual)
        results.append(gradients(m))
    train(compiled(ours, route, report))
    assert [s.route for s in report.sites] == [ROUTE[route]] * sites, report.sites
    judge(*results, gradients(ours), torch.finfo(torch.float32).eps)


# -- views and shared tensors ---------------------------------------------------------------------------------------


def test_views_of_one_packed_projection(route: str) -> None:
    def train(module: nn.Module) -> None:
        module(numbers(2, 19, 32, seed=3, grad=False).to(torch.get_default_dtype())).square().mean().backward()

    judged(layer(route), layer(route), route, train)


def test_keys_that_are_values(route: str) -> None:
    program = PROGRAM[route]
    check(lambda q, k: program(q, k, k), qkv(lq=19, lk=19)[:2], route)


def test_queries_that_are_keys_and_values(route: str) -> None:
    program = PROGRAM[route]
    check(lambda q: program(q, q, q), qkv()[:1], route)


def test_a_tensor_that_is_key_and_bias(interpreter: None) -> None:
    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + k[..., 0][..., None, :]).softmax(-1) @ v

    check(program, qkv(), "kernel")


# -- what is wanted -------------------------------------------------------------------------------------------------


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The bias is bounded: one that may be infinite is left to Inductor in training, but where it is learned."""
    return (q @ k.mT * 0.25 + torch.tanh(bias)).softmax(-1) @ v


@pytest.mark.parametrize("wanted", ["q", "k", "v", "t", "qv", "kt", "qkvt"])
def test_no_work_for_gradients_that_nobody_wants(wanted: str, interpreter: None, launches: Launches) -> None:
    inputs = [*qkv(), numbers(2, 1, 23, seed=9)]
    for name, x in zip("qkvt", inputs, strict=True):
        x.requires_grad_(name in wanted)
    check(biased, inputs, "kernel")
    assert launches.needs == [Needs.of([name in wanted for name in "qkvt"])]


def test_nothing_at_all_is_made_where_nothing_needs_a_gradient(interpreter: None, launches: Launches) -> None:
    inputs = [x.detach() for x in (*qkv(), numbers(2, 1, 23, seed=9))]
    assert not compiled(biased, "kernel", xfcompile.Report())(*inputs).requires_grad
    assert (launches.forwards, launches.needs) == (1, [])


def test_a_frozen_projection_of_keys(route: str, launches: Launches) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return PROGRAM[route](self.q(x)[:, None], *(y[:, None] for y in self.kv(x).chunk(2, -1)))

    def train(module: nn.Module) -> None:
        module(numbers(2, 19, 16, seed=3, grad=False).to(torch.get_default_dtype())).square().mean().backward()

    torch.manual_seed(0)
    module = Frozen()
    judged(module, copy.deepcopy(module), route, train)
    assert launches.needs == [Needs(True, False, False)] * (route == "kernel")


def test_attention_under_no_grad_sends_none_back(route: str) -> None:
    program = PROGRAM[route]

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = program(q, k, v)
        return program(q, fixed, v)

    check(mixed, qkv(lq=19, lk=19), route, sites=2)


def test_inference_and_training_by_one_compiled_module(route: str) -> None:
    module = layer(route)
    report = xfcompile.Report()
    ours = compiled(module, route, report)
    x = numbers(2, 19, 32, seed=3, grad=False)
    with torch.no_grad():
        before = ours(x)
    after = ours(x)
    assert after.requires_grad and not before.requires_grad
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(after, module(x))
    assert [s.route for s in report.sites] == [ROUTE[route]] * 2


# -- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, route: str, launches: Launches) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer(route)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    def train(module: nn.Module) -> None:
        x = numbers(2, 19, 32, seed=3).detach().to(torch.get_default_dtype()).requires_grad_()
        module(x).square().mean().backward()

    judged(Checkpointed(), Checkpointed(), route, train)
    assert launches.forwards == (2 if route == "kernel" else 0), "the forward was not run again"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_the_compiled_layer(reentrant: bool, route: str) -> None:
    report = xfcompile.Report()
    module = layer(route)
    ours = compiled(copy.deepcopy(module), route, report)
    results = []
    exact = copy.deepcopy(module).double()
    for m, dtype in ((exact, torch.float64), (module, torch.float32), (ours, torch.float32)):
        x = numbers(2, 19, 32, seed=3).detach().to(dtype).requires_grad_()
        checkpoint(m, x, use_reentrant=reentrant).square().mean().backward()
        assert x.grad is not None
        results.append({"gradient x": x.grad})
    assert report.sites
    judge(*results, torch.finfo(torch.float32).eps)


def test_gradients_of_several_batches_add_up(route: str) -> None:
    def train(module: nn.Module) -> None:
        for n in range(3):
            x = numbers(2, 19, 32, seed=n, grad=False).to(torch.get_default_dtype())
            (module(x).square().mean() / 3).backward()

    judged(layer(route), layer(route), route, train)


def test_backward_twice_through_a_graph_that_is_kept(route: str) -> None:
    report = xfcompile.Report()
    program = PROGRAM[route]
    inputs = qkv(lq=19, lk=19)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    total = compiled(program, route, report)(*leaves).square().sum()
    total.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves if x.grad is not None]
    total.backward()
    for x, first in zip(leaves, once, strict=True):
        torch.testing.assert_close(x.grad, 2 * first, rtol=0, atol=0)
    exact = torch.autograd.grad(program(*(xs := doubled(inputs))).square().sum(), xs)
    eager = torch.autograd.grad(program(*inputs).square().sum(), inputs)
    names = [f"gradient {x}" for x in "qkv"]
    judge(*(dict(zip(names, g, strict=True)) for g in (exact, eager, once)), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, route: str) -> None:
    module, ours = layer(route), layer(route)
    x = numbers(2, 19, 32, seed=3, grad=False)
    report = xfcompile.Report()

    def train(m: Callable[[Tensor], Tensor]) -> None:
        with torch.autocast("cpu", dtype):
            loss = m(x).float().square().mean()
        loss.backward()

    exact = copy.deepcopy(module).double()
    exact(x.double()).square().mean().backward()
    train(module)
    train(compiled(ours, route, report))
    assert [s.route for s in report.sites] == [ROUTE[route]]
    judge(gradients(exact), gradients(module), gradients(ours), torch.finfo(dtype).eps)


def test_a_scaled_loss_in_fp16_and_its_steps(route: str) -> None:
    """The steps of a GradScaler: one that overflows is skipped, all others are eager's."""
    x = numbers(2, 19, 32, seed=3, grad=False)
    report = xfcompile.Report()
    module, ours = layer(route), layer(route)
    exact = layer(route).double()

    def train(m: nn.Module, parameters: nn.Module, dtype: torch.dtype, scale: float) -> list[float]:
        optimizer = torch.optim.SGD(parameters.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        scales = []
        for _ in range(4):
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
                loss = m(x.to(dtype)).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    scale = 2.0**24  # beyond fp16 once it is in a gradient
    theirs = train(module, module, torch.float32, scale)
    mine = train(compiled(ours, route, report), ours, torch.float32, scale)
    assert theirs[0] < scale and mine == theirs
    taken = sum(b >= a for a, b in zip([scale, *theirs], theirs, strict=False))
    assert taken, "no step was taken"
    optimizer = torch.optim.SGD(exact.parameters(), lr=0.1)
    for _ in range(taken):
        optimizer.zero_grad()
        exact(x.double()).square().mean().backward()
        optimizer.step()
    states = [{f"weight {n}": p.detach() for n, p in m.named_parameters()} for m in (exact, module, ours)]
    judge(*states, torch.finfo(torch.float16).eps)


# -- Inductor's part ------------------------------------------------------------------------------------------------


def counting(route: str, compilations: list[int]) -> Callable[..., object]:
    """The backend, and a list that gets longer each time it is asked."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compilations.append(1)
        return xfcompile.xformers(gm, inputs, options=OPTIONS[route])

    return backend


def test_many_lengths_by_one_compilation(route: str) -> None:
    compilations: list[int] = []
    module = layer(route)
    exact = copy.deepcopy(module).double()
    ours = torch.compile(module, backend=counting(route, compilations), dynamic=True)
    with xfcompile.collect() as report:
        for length in (33, 47, 64):
            x = numbers(2, length, 32, seed=3)
            results = step(exact, doubled([x])), step(module, [x]), step(ours, [x])
            judge(*results, torch.finfo(torch.float32).eps)
    assert len(compilations) == 1
    assert [s.route for s in report.sites] == [ROUTE[route]]


@pytest.mark.parametrize(
    "lengths",
    [
        (33, 47, 64),
        pytest.param(
            (19, 47, 27),
            marks=pytest.mark.xfail(
                strict=True, raises=AssertionError, reason="lists of one block of queries are compiled for anew"
            ),
        ),
    ],
    ids=str,
)
def test_a_length_that_changes_under_way(lengths: tuple[int, ...], interpreter: None) -> None:
    """Without `dynamic`: the first length is compiled as it is, the second for all others."""
    report = xfcompile.Report()
    ours = compiled(biased, "kernel", report)
    for length in lengths:
        inputs = [*qkv(lq=length, lk=length), numbers(2, 1, length, seed=9)]
        exact, eager = step(biased, doubled(inputs)), step(biased, inputs)
        judge(exact, eager, step(ours, inputs), torch.finfo(torch.float32).eps)
    assert report.graphs == 2


def test_a_scale_that_is_computed_of_a_size(interpreter: None) -> None:
    check(attention, qkv(), "kernel", dynamic=True)


def test_max_autotune(route: str) -> None:
    program = PROGRAM[route]
    inputs = qkv()
    ours = torch.compile(program, backend=xfcompile.xformers, options={**OPTIONS[route], "max_autotune": True})
    with xfcompile.collect() as report:
        found = step(ours, inputs)
    assert [s.route for s in report.sites] == [ROUTE[route]]
    judge(step(program, doubled(inputs)), step(program, inputs), found, torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_the_mode_max_autotune() -> None:
    """A mode takes the place of options: what runs is what was timed to be the fastest, here and now."""
    with xfcompile.collect() as report:
        found = step(torch.compile(causal, backend=xfcompile.xformers, mode="max-autotune"), qkv())
    (site,) = report.sites
    assert site.route in ("sdpa", "inductor") and str(site.reason).startswith("timed")
    judge(step(causal, doubled(qkv())), step(causal, qkv()), found, torch.finfo(torch.float32).eps)


# -- second derivatives ---------------------------------------------------------------------------------------------


def test_a_second_derivative_of_a_compiled_program_is_refused(interpreter: None) -> None:
    """By torch itself, of any program compiled with AOTAutograd."""
    leaves = qkv()
    ours = torch.compile(attention, backend=xfcompile.xformers, options=OPTIONS["kernel"])
    (dq,) = torch.autograd.grad(ours(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=re.escape("does not currently support double backward")):
        dq.square().sum().backward()


def test_a_second_derivative_of_a_rewritten_graph_is_refused(interpreter: None) -> None:
    """Where nothing but autograd runs the graph, our own error says what to do."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        xfcompile.rewrite(gm, inputs, OPTIONS["kernel"])
        return gm

    leaves = qkv()
    ours = torch.compile(attention, backend=backend)
    (dq,) = torch.autograd.grad(ours(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'second derivative.*"attention": "inductor"'):
        dq.square().sum().backward()


def test_compiled_autograd_hands_a_list_to_the_graph_of_a_backward(route: str) -> None:
    """Of which nothing can be said but that it is read."""
    calls = xfcompile.Report()

    def whole(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        calls.extend(xfcompile.rewrite(gm, example_inputs, {"strict": True}))
        return gm.forward

    def train(module: nn.Module) -> None:
        loss = module(numbers(2, 19, 32, seed=3, grad=False).to(torch.get_default_dtype())).square().mean()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=whole)):
            loss.backward()

    judged(layer(route), layer(route), route, train)
    assert calls.graphs and not calls.failures
