"""A repeated launch is the one that Triton would make: of other tensors, of the same kernel, and of no other kernel."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gated_cases
import pytest
import torch
from attention_cases import Case, Inputs, Sizes, call, inputs, named
from backward_cases import floating, kernels
from torch import Tensor
from triton.backends.nvidia import driver

from xfcompile import activation
from xfcompile.activation import X
from xfcompile.kernels.attention import backward_layout, lists, lists_sizes, prepare, programs, repeat
from xfcompile.kernels.attention.repeat import MANY_DESCRIPTORS, Described, Launch, encode_once
from xfcompile.kernels.bias_act_dropout import bias_act_dropout, linear_act_dropout, text_of
from xfcompile.kernels.bias_act_dropout import calls as bias_calls
from xfcompile.kernels.gated_mlp import gated_mlp_backward
from xfcompile.kernels.gated_mlp import launch as gated_launch
from xfcompile.kernels.gated_mlp import programs as gated_programs
from xfcompile.kernels.gated_mlp.operands import Dropout

# -- one launch ----------------------------------------------------------------------------------------------------


class Compiled:
    """What Triton makes of a kernel; it counts, and keeps what it was launched with."""

    packed_metadata, function = "metadata", "function"

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


class Kernel:
    """A kernel of Triton's: `made` has what was compiled at each of the calls that went through its binder."""

    arg_names = ("x_ptr", "y_ptr", "n", "s", "BLOCK")

    def __init__(self) -> None:
        self.made: list[Compiled] = []

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> None:
        """Compiles, and launches nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def bind(*arguments: Any, **constants: Any) -> Compiled:
            self.made.append(Compiled())
            return self.made[-1]

        return bind


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches on the CPU as on the current device, which has the number -1 there."""
    monkeypatch.setattr(repeat, "_current_device", lambda: -1)
    monkeypatch.setattr(repeat, "_stream", lambda device: 7)


MEMORY = torch.zeros(4096, dtype=torch.uint8)
START = -MEMORY.data_ptr() % 16


def at(offset: int) -> Tensor:
    return MEMORY[START + offset :]


def launched(kernel: Kernel, numbers: tuple[int, ...] = (48,), made: dict[object, Any] | None = None) -> Launch:
    return Launch(kernel, 3, numbers, {"BLOCK": 64}, {"num_warps": 4}, made=made)


def test_the_second_launch_is_of_the_compiled_kernel_with_its_own_pointers() -> None:
    kernel = Kernel()
    one = launched(kernel)
    first = one([at(0), at(64)], [2.5])
    assert one([at(128), at(32)], [3.5]) is first
    (arguments,) = first.launched
    assert len(kernel.made) == 1
    pointers = (at(128).data_ptr(), at(32).data_ptr())
    assert arguments == (3, 1, 1, 7, "function", "metadata", None, None, None, *pointers, 48, 3.5, 64)


def test_pointers_that_are_not_aligned_are_for_a_kernel_of_their_own() -> None:
    kernel = Kernel()
    one = launched(kernel)
    layouts = [(0, 0), (4, 0), (0, 8), (4, 12)]
    made = [one([at(a), at(b)], [1.0]) for a, b in layouts]
    assert len({id(x) for x in made}) == len(kernel.made) == 4
    assert [one([at(a + 16), at(b + 32)], [1.0]) for a, b in layouts] == made
    assert [len(x.launched) for x in made] == [1] * 4


@pytest.mark.parametrize("large", [2**31, -(2**31), 2**40])
def test_large_integers_are_asked_about_each_time(large: int) -> None:
    kernel = Kernel()
    one = launched(kernel)
    usual = one([at(0), at(0)], [5])
    for _ in range(2):
        assert one([at(0), at(0)], [large]) is not usual
    assert one([at(0), at(0)], [2**31 - 1]) is usual
    assert len(kernel.made) == 3


@pytest.mark.parametrize(
    ("numbers", "other", "same"),
    [
        ((48, 5), (64, 7), True),
        ((48, 5), (16, 2**31 - 1), True),
        ((48, 5), (50, 5), False),
        ((48, 5), (48, 16), False),
        ((48, 5), (48, 1), False),
        ((48, 1), (48, 5), False),
        ((48, 5), (48, 0), False),
        ((48, 5), (2**31, 5), False),
        ((2**62, 5), (2**63, 5), False),
    ],
)
def test_launches_with_numbers_of_one_class_have_a_kernel_in_common(
    numbers: tuple[int, ...], other: tuple[int, ...], same: bool
) -> None:
    kernel, made = Kernel(), {}
    first = launched(kernel, numbers, made)([at(0), at(0)])
    second = launched(kernel, other, made)([at(0), at(0)])
    assert (first is second) == same
    if same:
        assert first.launched[0][-3:] == (*other, 64)
        assert launched(kernel, other, made)([at(4), at(0)]) is not first


def test_what_is_free_is_not_specialised_on() -> None:
    kernel = Kernel()
    fixed, specialised = (SimpleNamespace(name="s", do_not_specialize=x) for x in (True, False))
    kernel.params = [None, None, None, fixed]  # type: ignore[attr-defined]
    launched(kernel)([at(0), at(0)], [5])
    kernel.params[3] = specialised  # type: ignore[attr-defined]
    launched(kernel)([at(0), at(0)], [5.0])  # of floats Triton knows nothing
    with pytest.raises(AssertionError, match="specialised on"):
        launched(kernel)([at(0), at(0)], [5])


def test_profilers_of_triton_are_told_of_every_launch() -> None:
    from triton import knobs

    kernel = Kernel()
    one = launched(kernel)
    usual = one([at(0), at(0)])
    hook = lambda *args: None  # noqa: E731
    chain = knobs.runtime.launch_enter_hook
    if not hasattr(chain, "add"):
        pytest.skip("this version of Triton has no chains of hooks")
    chain.add(hook)
    try:
        assert one([at(0), at(0)]) is not usual
    finally:
        chain.remove(hook)
    assert len(kernel.made) == 2
    again = one([at(0), at(0)])
    assert again is kernel.made[-1] and len(again.launched) == 1


def test_another_current_device_is_not_launched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    one = launched(kernel)
    one([at(0), at(0)])
    monkeypatch.setattr(repeat, "_current_device", lambda: 1)
    assert one.repeat([at(0).data_ptr()] * 2) is None


# -- the ops -------------------------------------------------------------------------------------------------------


class Interpreted:
    """In the place of a compiled kernel: the interpreter, given the pointers that a compiled one would be given."""

    packed_metadata = function = None

    def __init__(self, one: Launch, tensors: list[Tensor]) -> None:
        self.one, self.dtypes = one, [x.dtype for x in tensors]

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        _, _, _, metadata, enter, leave, *given = arguments
        assert metadata is enter is leave is None
        tensors = tensors_at(given[: len(self.dtypes)], self.dtypes)
        for n, described in enumerate(self.one.described):
            tensors[n] = described.make(tensors[n])
        count = len(self.one.constants)
        numbers = given[len(tensors) : len(given) - count]
        assert tuple(given[len(given) - count :]) == tuple(self.one.constants.values())
        self.one.kernel[x, y, z](*tensors, *numbers, **self.one.constants, **self.one.options)
        REPEATED.append(self)


REPEATED: list[Interpreted] = []


def tensors_at(given: list[Any], dtypes: list[torch.dtype]) -> list[Tensor]:
    """What is there: an element, which the interpreter reads its neighbours of, or all of what has a descriptor."""
    known: dict[int, Tensor] = {}
    for x, dtype in zip(given, dtypes, strict=True):
        described = not isinstance(x, int)
        pointer = x.data_ptr() if described else x
        shape, strides = ((1, *x.shape), (0, *x.strides)) if described else ((1,), (1,))
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        memory = (ctypes.c_byte * (size * dtype.itemsize)).from_address(pointer)
        if pointer not in known:  # the interpreter copies memory once
            known[pointer] = torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)
    return [known[x if isinstance(x, int) else x.data_ptr()] for x in given]


@pytest.fixture
def repeating(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches are repeated as on a GPU, but that the interpreter is what runs."""
    first = Launch._first

    def remembering(self: Launch, tensors: list[Tensor], pointers: list[int], free: list[Any]) -> Any:
        first(self, tensors, pointers, free)
        made = Interpreted(self, tensors)
        self._remember(tensors[0].device, pointers, made)
        return made

    monkeypatch.setattr(Launch, "_first", remembering)
    forget()
    REPEATED.clear()
    yield
    forget()


def forget() -> None:
    for program in (*programs.known.values(), *gated_programs.known.values()):
        program.calls.clear()
    for masks in lists._programs.values():
        masks.launches.clear()
    for layouts in BACKWARDS:
        layouts.clear()
    bias_calls.known.clear()


BACKWARDS: list[dict[object, Any]] = []
"""What the backwards of a test remember."""


def check(runs: list[Callable[[], Any]]) -> None:
    """Each of some calls gives what it gives where nothing is remembered, whatever was called before, twice."""
    right = []
    for run in runs:
        forget()
        right.append([x.clone() for x in run()])
    forget()
    for run, wanted in [*zip(runs, right, strict=True)] * 2:
        for x, y in zip(run(), wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def another(x: Inputs) -> Inputs:
    """Other numbers of the same layout, elsewhere in memory."""
    q, k, v = (y.clone(memory_format=torch.preserve_format).mul_(0.5) for y in (x.q, x.k, x.v))
    return dataclasses.replace(x, q=q, k=k, v=v)


def variants(case: Case, sizes: Sizes) -> list[Inputs]:
    """Inputs that differ by one thing each."""
    usual = inputs(case, torch.float32, sizes=sizes)
    made = [usual, another(usual)]
    made += [inputs(case, torch.float32, layout, sizes) for layout in ("transposed", "expanded")]
    made += [inputs(case, torch.float16, sizes=sizes)]
    changed = [{"lk": sizes.lk + 16}, {"lq": sizes.lq + 1}, {"dv": sizes.dv + 8}]
    made += [inputs(case, torch.float32, sizes=dataclasses.replace(sizes, **change)) for change in changed]
    moved = torch.empty(usual.k.numel() + 1)[1:].view(usual.k.shape).copy_(usual.k)
    made.append(dataclasses.replace(usual, k=moved))
    made.append(dataclasses.replace(usual, q=usual.q[:, :, 1:]))  # other sizes of the same strides
    made.append(dataclasses.replace(usual, k=usual.k[:, :, 1:], v=usual.v[:, :, 1:]))
    made.append(dataclasses.replace(usual, v=usual.v[..., :-2]))
    return made + [dataclasses.replace(usual, **{name: turned(getattr(usual, name))}) for name in "qkv"]


def turned(x: Tensor) -> Tensor:
    """The same in other strides."""
    return x.mT.contiguous().mT


SMALL = Sizes(batch=1, heads=2, kv_heads=2, lq=5, lk=9, dq=8, dv=8)


OTHERS = [("causal", False), ("scale_at_run_time", False), ("plain", True)]


@pytest.mark.parametrize(
    ("name", "few"),
    [("documents", False), ("bias_bhij", True), *[pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS]],
)
def test_attention(name: str, few: bool, repeating: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfcompile.kernels.attention import launch_decode

    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)  # lists of tiles are made
    monkeypatch.setattr(launch_decode, "MANY_KEYS", 1)
    case = named(name)
    sizes = dataclasses.replace(SMALL, lq=2) if few else SMALL
    check([lambda x=x: call(case.spec, x) for x in variants(case, sizes)])
    assert len(REPEATED) >= 9


def test_scalars_are_those_of_the_call(repeating: None) -> None:
    case = named("scale_at_run_time")
    x = inputs(case, torch.float32, sizes=SMALL)
    others = [dataclasses.replace(x, floats=[f]) for f in (0.5, 2, -1.0)]  # generated code may write 2.0 as 2
    check([lambda x=y: call(case.spec, x) for y in (x, *others)])
    results = [call(case.spec, y)[0] for y in (x, *others)]
    assert not any(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize(
    "name", ["bias_bhij", *[pytest.param(x, marks=pytest.mark.slow) for x in ("causal", "documents")]]
)
def test_gradients_of_attention(name: str, repeating: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists_sizes, "FEW_TILES", 0)
    case = named(name)
    made = variants(case, SMALL)
    needed = tuple(floating(made[0]))
    program = backward_layout.prepare(prepare(case.spec), needed)
    BACKWARDS[:] = [program.layouts]

    def run(x: Inputs, lay: Callable[[Tensor], Tensor] = lambda dout: dout) -> list[Tensor]:
        shape = (*x.q.shape[:3], x.v.shape[3])
        return kernels(case, x, lay(torch.linspace(-1, 1, math.prod(shape)).view(shape).to(x.q.dtype)))

    check([*[lambda x=x: run(x) for x in made], lambda: run(made[0], turned)])
    assert len(REPEATED) >= 2 * 10


GATED = gated_cases.Case(rows=20, features=12, inner=24)


@pytest.mark.parametrize(
    "about",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"layout": "up even", "biased": True},
        {"dtype": torch.float16, "inner": 32, "layout": "gate first"},
    ],
    ids=str,
)
def test_gated_mlps(about: dict[str, Any], repeating: None) -> None:
    case = GATED.but(**about)
    changed = [{"rows": 21}, {"rows": 2}, {"memory": "transposed"}, {"memory": "poisoned"}, {"features": 16}]
    changed += [{"dtype": torch.bfloat16}, {"layout": "separate"}, {"layout": "up first"}, {"biased": True}]
    cases = [case, *[case.but(**change) for change in changed]]
    check([lambda c=c: gated_cases.call(c, "dual") for c in cases])
    assert len(REPEATED) >= len(cases)


def test_gradients_of_gated_mlps(repeating: None) -> None:
    generator = torch.Generator().manual_seed(0)
    dout, other = (torch.randn(2, 6, 24, generator=generator) for _ in range(2))
    saved = torch.randn(2, 6, 48, generator=generator)
    key = gated_cases.key_of("silu")
    seed = torch.tensor([5])

    def run(dout: Tensor, saved: Tensor, product: bool = True, layout: str = "gate first", p: float = 0.0) -> Any:
        return gated_mlp_backward(dout, saved, key, layout, product, seed, p)

    calls = [
        lambda: run(dout, saved),
        lambda: run(other, saved * 2),
        lambda: run(dout.transpose(0, 1).contiguous().transpose(0, 1), saved),
        lambda: run(dout, saved, product=False),
        lambda: run(dout, saved, layout="up even"),
        lambda: run(dout, saved, p=0.5),
        lambda: run(dout, saved, p=0.25),
        lambda: run(dout[0], saved[0]),
    ]
    check(calls)
    assert len(REPEATED) >= len(calls)


def test_bias_act_dropout(repeating: None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 6, 24, generator=generator) for _ in range(2))
    bias, weight = torch.randn(24, generator=generator), torch.randn(16, 24, generator=generator)
    gelu, relu = text_of(activation.gelu(X, "none")), text_of(activation.relu(X))
    shifted = torch.empty(25)[1:].copy_(bias)
    strided = torch.stack([bias, -bias], 1)[:, 0]

    def run(x: Tensor, bias: Tensor | None = bias, text: str = gelu, dtype: torch.dtype = torch.float32) -> Any:
        return [bias_act_dropout(x, bias, [], [], None, 0, text, 0.0, dtype, False)]

    def product(x: Tensor, weight: Tensor = weight, save: bool = True) -> Any:
        return linear_act_dropout(x, weight, bias[:16], [], [], None, 0, gelu, 0.0, torch.float32, save)

    def gradients(dout: Tensor, x: Tensor, needed: tuple[bool, bool] = (True, True)) -> Any:
        backward = torch.ops.xfcompile.bias_act_dropout_backward
        return backward(dout, x, bias, [], None, 0, gelu, 0.0, 0, list(needed), ["float32", "float16"])

    turned, permuted = x.transpose(0, 1), x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    calls = [
        lambda: run(x),
        lambda: run(y),
        lambda: run(x, None),
        lambda: run(x, shifted),
        lambda: run(x, strided),
        lambda: run(x, text=relu),
        lambda: run(x, dtype=torch.float16),
        lambda: run(x.half(), bias.half()),
        lambda: run(turned),
        lambda: run(permuted),
        lambda: run(x[:, ::2]),
        lambda: product(x),
        lambda: product(y),
        lambda: product(turned),
        lambda: product(x, save=False),
        lambda: product(x, weight.t().contiguous().t()),
        lambda: gradients(x, y, (False, True)),  # less before more: what is remembered of more has all of it
        lambda: gradients(x, y, (True, False)),
        lambda: gradients(x, y),
        lambda: gradients(y, x),
        lambda: gradients(turned, y.transpose(0, 1)),
    ]
    check(calls)
    assert len(REPEATED) >= len(calls)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gated_mlps_by_the_product_for_hopper(saves: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated call has the addresses and numbers of a first one."""
    from xfcompile.kernels.gated_mlp import launch_hopper

    seen: list[Any] = []

    class Gemm:
        def __init__(self, *about: Any) -> None: ...

        def __call__(
            self, x: Any, weights: Any, outs: Any, biases: Any, vectors: Any, tensors: Any, *random: Any
        ) -> None:
            seed, numbers = random or (None, [])
            given = [x, *weights, *outs, *(x if b is None else b for b in biases), *([] if seed is None else [seed])]
            seen.append(([y.data_ptr() for y in given], list(numbers)))

        def repeat(self, pointers: Any, numbers: Any) -> Compiled:
            seen.append((pointers, list(numbers)))
            return Compiled()

    monkeypatch.setattr(launch_hopper, "Gemm", Gemm)
    monkeypatch.setattr(launch_hopper, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(launch_hopper, "declines", lambda *about: None)
    monkeypatch.setattr(gated_launch.launch_few, "declines", lambda *about: "it is another one's")
    monkeypatch.setattr(gated_launch, "device_generation", lambda device: gated_launch.HOPPER)
    x, weight, up = (torch.zeros(64, 64, dtype=torch.float16) for _ in range(3))
    on_gpu = SimpleNamespace(type="cuda", index=0)
    real = gated_launch._forward

    def forward(prepared: Any, operands: Any, layout: Any, dropout: Any, out: Any, saved: Any) -> Any:
        assert out.device.type == "cpu"
        placed = SimpleNamespace(device=on_gpu, shape=out.shape)
        return real(prepared, operands, layout, dropout, placed, saved)  # type: ignore[arg-type]

    monkeypatch.setattr(gated_launch, "_forward", forward)
    program = gated_programs.program(gated_cases.key_of("silu"))
    seed, dropout = torch.tensor([5]), Dropout(None, p)
    about = (x, weight, up, x[0], None)
    run = gated_launch._Forward(program, *about, "separate", saves, torch.float16, dropout)
    for called in range(2):
        out, saved = run(*about, seed)
        stored = [out, *([saved, saved[:, 64:]] if saves else [])]
        given = [x, weight, up, *stored, x[0], x, *([seed] if p else [])]
        assert seen[called] == ([y.data_ptr() for y in given], [*dropout.numbers, 0] if p else [])
    assert len(seen) == 2


class Launcher:
    """Triton's launcher of a kernel with a descriptor and a number, its arguments noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded: list[Any] = []
        self.launched: list[tuple[Any, ...]] = []

        def encode(descriptor: Any, metadata: Any) -> list[Any]:
            self.encoded.append((descriptor.base.data_ptr(), *descriptor.shape, *descriptor.strides, metadata))
            return [("encoded", descriptor.data_ptr()), *descriptor.shape, *descriptor.strides]

        monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
        signature = {0: "tensordesc<bf16[64, 64],NVMMA>", 1: "i32"}
        self.launch = driver.wrap_handle_tensordesc(lambda *given: self.launched.append(given), signature, ["about"])

    def __call__(self, descriptor: Any, number: int) -> Any:
        """As Triton's do: arguments come one by one, or the kernel's in a tuple."""
        base = len(getattr(driver, "_BASE_ARGS_FORMAT", "")) or None
        if base is None:
            self.launch("grid", (descriptor, number))
        else:
            self.launch(*["grid"] * base, descriptor, number)
        last = self.launched[-1]
        return list(last[-1]) if base is None else list(last[base:])


def test_a_descriptor_is_encoded_once_and_again_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(monkeypatch)
    encode_once(launcher)
    encode_once(launcher)
    like = Described((4, 64), (64, 1), lambda x: x)
    one = Launch(Kernel(), 1, (), {}, {}, [like])
    for pointer, number in ((64, 7), (64, 8), (128, 9), (64, 10)):
        given = launcher(one._described_at(0, pointer), number)
        assert given == [("encoded", pointer), 4, 64, 64, 1, number]
    assert launcher.encoded == [(64, 4, 64, 64, 1, "about"), (128, 4, 64, 64, 1, "about")]


def test_another_launchs_descriptor_at_the_same_place_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(monkeypatch)
    encode_once(launcher)
    for rows in (4, 2):
        one = Launch(Kernel(), 1, (), {}, {}, [Described((rows, 64), (64, 1), lambda x: x)])
        assert launcher(one._described_at(0, 64), 7) == [("encoded", 64), rows, 64, 64, 1, 7]


def test_descriptors_of_triton_are_encoded_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(monkeypatch)
    encode_once(launcher)
    other = SimpleNamespace(shape=(4, 64), strides=(64, 1), data_ptr=lambda: 64)
    other.base = other
    for number in (7, 8):
        assert launcher(other, number) == [("encoded", 64), 4, 64, 64, 1, number]
    assert len(launcher.encoded) == 2


def test_many_descriptors_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Launch(Kernel(), 1, (), {}, {}, [Described((4, 64), (64, 1), lambda x: x)])
    first = one._described_at(0, 0)
    assert one._described_at(0, 0) is first
    for n in range(1, MANY_DESCRIPTORS + 1):
        one._described_at(0, 64 * n)
    assert len(one._descriptors) == 1
    assert one._described_at(0, 0) is not first


@pytest.mark.parametrize("launch", [None, len, lambda *given: given])
def test_a_launcher_that_is_made_otherwise_stays_as_it_is(launch: Any) -> None:
    launcher = SimpleNamespace(launch=launch)
    encode_once(launcher)
    assert launcher.launch is launch
