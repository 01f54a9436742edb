"""Positions, whole numbers and truth values in dtypes that do not hold them all, and what is counted from the end."""

# ruff: noqa: E501 (the text of programs)

from __future__ import annotations

from dataclasses import dataclass

from writer import Writer

FLOATS = ("torch.bfloat16", "torch.float16", "torch.float32")
BYTES = ("torch.uint8", "torch.int8", "torch.int16")


@dataclass(frozen=True)
class Length:
    """How many there are of something, and how the program says that."""

    n: int
    text: str

    def __str__(self) -> str:
        return self.text


def vector(w: Writer, n: Length) -> str:
    """An expression of n elements, whatever its dtype: what one is says its place, or data, exactly."""
    return f"({_vector(w, n)})"


def _vector(w: Writer, n: Length) -> str:
    i, start = f"torch.arange({n})", w.one(0, 1, 254, 255, 2046, 2047)
    m = f"({n} + {start})"
    few, byte = w.one(*FLOATS), w.one(*BYTES)
    kind = w.one(
        "few", "few", "small", "small", "large", "bits", "truth", "truth", "end", "end", "padded", "data", "data"
    )
    if kind == "few":
        return w.one(
            f"torch.arange({start}, {m}, dtype={few})", f"({i} + {start}).to({few})", f"{i}.to({few}) + {start}", f"({i}.to({few}) + {start}) * 0.5",
            f"torch.arange({start}, {m}).to({few}) - {start + 1}", f"{start} - {i}.to({few})", f"({i} + {start}).to({few}).long()", f"({i} + {start}).to({few}) // 3",
            f"({i} + {start}).to({few}) % 2", f"({i} + 14).to({w.one('torch.float8_e4m3fn', 'torch.float8_e5m2')}).float()", f"{i} + torch.full(({n},), -4.0).to({few})",
            f"({i} + {start}) / torch.tensor(2.0).to({few})", f"torch.linspace(0, 1, {n})", f"torch.arange(0.5, {n}).to({few})",
        )  # fmt: skip
    if kind == "small":
        return w.one(
            f"torch.arange({n}, dtype={byte}) - 2", f"torch.arange({n}, dtype={byte}) * 100", f"({i} + 126).to({byte})", f"({i} - 2).to({byte}) // 2", f"-torch.arange({n}, dtype={byte})",
            f"({i} > 1).to({byte}) - 1", f"({i} > 1).to({byte}) * 200 + 100", f"~{i}.to({byte})", f"({i} * 70).to({byte}).long()", f"({i} > 1).to({byte}) ^ 255", f"torch.arange({n}, dtype={byte}).abs() * 64",
            f"1 - ({i} > 1).to({byte}) * 2", f"({i} - 1).to({byte}).to(torch.float32)", f"torch.full(({n},), 100, dtype={byte}) + torch.arange({n}, dtype={byte}) * 30",
            f"torch.arange({n}, dtype={byte}) << 6", f"({i}.to({byte}) * 100).clamp(min=3)", f"torch.full(({n},), 255).to({byte})", f"torch.maximum({i}.to({byte}) - 3, {i}.to({byte}))",
            f"{i}.to({byte}) * 50 % 7", f"F.pad({i}.to({byte})[1:] * 90, (1, 0), value=3)", f"torch.cat([{i}.to({byte})[1:] * 90, torch.full((1,), 3, dtype={byte})])",
            f"{i}.to({byte}) * torch.tensor(100)", f"torch.where({i} > 1, {i}.to({byte}) - 4, 7)", f"({i}.to({byte}) - 2).abs()", f"torch.diff(torch.arange({n} + 1, dtype={byte}).flip(0) * 50)",
        )  # fmt: skip
    if kind == "large":
        return w.one(
            f"{i} * 3_000_000_000_000_000_000", f"torch.arange({n}, dtype=torch.int32) * 1_500_000_000", f"({i} + 2**31 - 2).int()", f"({i} + 2**31 - 2).int() > 0", f"{i} * 2**62 * 2",
            f"({i} * 2**31).int() + {i}", f"torch.arange({n}, dtype=torch.int32) + (2**31 - 3)", f"({i} + 2**24 - 1).float()", f"({i} + 2**24 - 1).float() + 1", f"torch.arange({n}) * 2**32 // 2**31",
            f"({i} + 2**53 - 1).double() % 3", f"({i} + 2**24) % 5", f"({i} + 2**31) % 3", f"({i} + 2**33) // 2**32", f"({i} - 2**40).float()", f"{i} + 2**63 - 3", f"({i} * 2**40).to(torch.int16)",
            f"(({i} + 2**24 - 1).float() == 2**24)", f"{i}.pow(40)", f"({i} + 2**31) - 2**31", f"({i} + 40000) * ({i} + 60000)", f"(torch.arange({n}, dtype=torch.int32) + 40000) * 60000",
        )  # fmt: skip
    if kind == "bits":
        return w.one(
            f"torch.arange({n}, dtype=torch.int32).view(torch.float32)", f"({i}.float() - 2).view(torch.int32)", f"({i} - 2).view(torch.float64)", f"torch.arange({n}, dtype=torch.int8).view(torch.uint8)",
            f"({i} - 2).to(torch.int8).view(torch.uint8)", f"({i} > 1).view(torch.uint8) - 1", f"{i}.to(torch.int16).view(torch.bfloat16)", f"({i} - 2).half().view(torch.int16)", f"({i} > 1).view(torch.int8) * 100",
            f"{i}.view(torch.int32)[::2]", f"({i} + 1) & 2", f"{i} | 1", f"{i} ^ 3", f"{i} >> 1", f"~{i}", f"(({i} > 0).byte() & 3)", f"({i} % 2).bool().view(torch.uint8).view(torch.bool)",
        )  # fmt: skip
    if kind == "truth":
        a, b = f"({i} < 2)", w.one(f"({i} > 0)", f"({i} % 2 == 0)", f"torch.ones({n}, dtype=torch.bool)")
        return w.one(
            f"torch.diff(torch.arange({n} + 1) < 2)", f"{a}.cumsum(0)", f"{a}.float().cumsum(0)", f"{a} + {b}", f"{a} * {b}", f"{a}.int() + {b}", f"{a}.int() - {b}.int()", f"{a}.byte() - {b}.byte()", f"{a} ^ {b}",
            f"({a} + {b}) + {b}", f"torch.add({a}, {b})", f"({a} + {b}).int()", f"{a} * 2 + {b}", f"{a} + 1", f"{a} * 0.5", f"{a} / 2", f"{a} + {b}.float()", f"({a} + {b}) * 3", f"torch.sub({a}.int(), {b}.int(), alpha=2)",
            f"torch.maximum({a}, {b})", f"torch.where({a}, {b}, True)", f"torch.where({a}, 1, {b}.int())", f"{a}.logical_not() + {b}", f"{a} == {b}", f"{a} < {b}", f"{a} >= {b}", f"({a} == 1)", f"({a} > 0)",
            f"{a}.sum() * {b}", f"{a}.any() & {b}", f"{a}.all(0, keepdim=True) | {b}", f"{a}.clamp(max=0)", f"{a}.flip(0) + {b}", f"torch.minimum({a}.int(), {b}.int())",
            f"{a} & 1", f"{a}.long() & {b}", f"{a} | {b}.int()", f"{i} * {a}", f"{i} + {a}", f"{i} - {a}.int() * {i}", f"{a}.cumsum(0) == {b}.cumsum(0)", f"{a}.byte() * 255 + {b}", f"({a} + {b}).to(torch.bfloat16) + 256",
            f"{a} < 0.5", f"{a} > 0.5", f"{a} == 2", f"{a} != -1", f"{a}.to(torch.float16) == {b}", f"torch.pow({a}.int(), 2)", f"{a}.cummax(0).values", f"torch.addcmul({i}, {a}.long(), {b}.long(), value=3)",
        )  # fmt: skip
    if kind == "end":
        return w.one(
            f"torch.arange({n} + 3)[-{n}:]", f"torch.arange({n} + 2)[-{n} - 1:-1]", f"{i}[{i} - {n}]", f"{i}[-1:].expand({n})", f"{i}[-1] - {i}", f"{i}.narrow(0, -1, 1) - {i}", f"{i}.select(0, -2) >= {i}", f"torch.arange({n} + 9)[-9:][:{n}]",
            f"torch.arange({n} + 9)[9:]", f"torch.arange({n})[-100:]", f"torch.arange({n})[:100]", f"torch.arange({n} + 2)[1:-1]", f"torch.arange({n} + 2)[:-2]", f"torch.arange(2 * {n})[::2]", f"torch.arange(2 * {n})[-{n}::1]",
            f"torch.arange({n}).roll(-1)", f"torch.arange({n}).roll({n} + 1)", f"torch.arange({n} - 1, -1, -1)", f"torch.arange({n}, 0, -1)", f"torch.arange(0, -{n}, -1)", f"torch.arange(0, 2 * {n}, 2)", f"torch.arange(3 * {n}).view(3, -1)[-1]", f"torch.arange(3 * {n}).view(-1, 3)[:, -2]",
            f"torch.arange(2 * {n}).chunk(2)[-1]", f"torch.arange({n} + 3).split([3, {n}])[-1]", f"torch.arange({n} + 3).tensor_split([3])[-1]", f"torch.arange({n})[{i}.flip(0)]", f"torch.arange({n}).index_select(0, {i}.flip(0))", f"torch.arange({n} + 1).unfold(0, 2, 1)[:, -1]",
            f"{i}.take({n} - 1 - {i})", f"{i}.gather(0, {n} - 1 - {i})", f"torch.cat([{i}[-2:], {i}])[:{n}]", f"torch.cat([{i}, {i}])[-{n} - 2:-2]", f"torch.stack([{i}, {i}.flip(0)])[-1]", f"{i}.repeat(2)[-{n}:]", f"{i}.repeat_interleave(2)[-{n}:]",
        )  # fmt: skip
    if kind == "padded":
        mode = w.one("'reflect'", "'replicate'", "'circular'", "'constant'")
        return w.one(
            f"F.pad({i}.float()[None], (1, 0), mode={mode})[0, :-1]", f"F.pad({i}.float()[None], (0, 1), mode={mode})[0, 1:]", f"F.pad({i}.float()[None, None], (1, 1), mode={mode})[0, 0, -{n}:]",
            f"F.pad({i}[1:], (1, 0), value=-1)", f"F.pad({i}[1:], (0, 1), value=7)", f"F.pad(torch.arange({n} + 2), (-1, -1))", f"F.pad(torch.arange({n} + 1), (-2, 1), value=-3)", f"F.pad(({i} < 2)[1:], (1, 0), value=True)", f"F.pad({i}[1:].to(torch.uint8), (1, 0), value=255)",
        )  # fmt: skip
    d = f"{w.extra(n.n)}.detach()"
    return w.one(
        f"{i}[({d} * 10).long() % {n}]", f"({d} * 300).int().to({byte})", f"({d} * 3).int().to({few}) + {start}", f"{d}.to({few}) + {start}", f"{d}.to(torch.float8_e4m3fn).float()", f"({d} * 3).int() + {i}", f"({d} * 3).int() * {i} % 3",
        f"{d}.to({few})", f"{d}.sign()", f"{d}.round().to({byte}) * 100", f"({d} > 0) + ({d} < -1)", f"{d}.bool()", f"({d} > 0).to({byte}) - 1", f"{d}.half() == {d}", f"{d}.bfloat16() > {d}", f"({d} > 0).cumsum(0)", f"{d}.argsort()", f"{i} + ({d} > 0)", f"({d} * 2).int() == {i}",
        f"(({d} > 0).byte() * 255 + 1)", f"torch.diff(F.pad({d} > 0, (1, 0)))", f"{i}[{d}.argsort()]", f"{d}[{i}.flip(0)]", f"{d}[({d} * 10).long() % {n}]", f"{d}[-1:] > {d}", f"{d}.log()", f"{d}.sqrt() > 1", f"{d} / 0 > 0", f"({d} / 0).isinf()", f"({d} * 1e30 * 1e30) == float('inf')", f"({d}.log() >= 0)", f"~({d}.log() < 0)", f"{d}.log() == {d}.log()",
        f"({d} * 3).long() * 3_000_000_000_000_000_000", f"({d} * 100).to(torch.int8) + 100", f"({d}.abs() * 3).long().clamp(max={n} - 1)", f"torch.maximum({d}, {d}.log()) > 0", f"{d}.clamp(min=0).log() > -1", f"{d}.nan_to_num() > 0", f"F.one_hot(({d} * 10).long() % {n}, {n})[0]", f"({d} * 1000).to(torch.int16) * 10",
    )  # fmt: skip


def matrix(w: Writer, rows: Length, columns: Length) -> str:
    """A matrix of such elements, or a row that all its rows share."""
    return f"({_matrix(w, rows, columns)})"


def _matrix(w: Writer, rows: Length, columns: Length) -> str:
    if w.chance(25):
        return vector(w, columns)
    if w.chance(40):
        ones, byte, few = f"torch.ones({rows}, {columns}", w.one(*BYTES), w.one(*FLOATS)
        i, j = f"torch.arange({rows})[:, None]", f"torch.arange({columns})"
        return w.one(
            f"{ones}, dtype={byte}).tril() - 1", f"{ones}).tril().to({byte}) * 255", f"({i} >= {j}).to({byte}) - 1", f"({i} >= {j}) + ({j} == 0)", f"({i} >= {j}) * ({j} > 0)", f"({i} - {j}).to({byte})", f"({i} - {j}).to(torch.uint8) < 3",
            f"1 - ({i} >= {j}).to({byte}) * 2", f"({i} * {j} * 60).to({byte})", f"{i}.to({byte}) * {j}.to({byte}) * 60", f"{ones}, dtype=torch.bool).tril().cumsum(-1)", f"torch.diff({ones}+1, dtype=torch.bool).tril(), dim=-1)", f"({i} >= {j}).diff(dim=-1, prepend=({i} < 0))",
            f"({i} + 255).to({few}) - ({j} + 255).to({few})", f"({i} + 255).to({few}) >= ({j} + 255).to({few})", f"({i} + 2047).to({few}) == ({j} + 2048).to({few})", f"{ones}, dtype={few}).tril() - 1", f"{ones}).triu(-1).bool() ^ ({i} == {j})", f"({i} - {j}).to(torch.float8_e5m2).float()",
            f"F.pad(({i} - {j}).float()[None], (1, 0), mode='replicate')[0, :, :-1]", f"F.pad(({i} - {j}).float()[None], (1, 0), mode='circular')[0, :, :-1]", f"F.pad(({i} - {j}).float()[None], (0, 0, 1, 0), mode='reflect')[0, :-1]", f"({i} - {j})[..., {j}.flip(0)]", f"({i} - {j}).gather(-1, ({j} * 0).expand({rows}, {columns}))",
            f"torch.eye({rows}, {columns}, dtype=torch.bool) + ({j} == 0)", f"torch.eye({rows}, {columns}, dtype={byte}) - 1", f"({i} - {j}).sign().to({byte})", f"({i} - {j}).float().view(torch.int32)", f"torch.bucketize(({i} - {j}), torch.tensor([-1, 0, 2]))", f"({i} - {j})[-1:] >= {j}", f"({i} >= {j})[-{rows}:, -{columns}:]",
            f"torch.where({i} >= {j}, {i}.to({byte}) - 3, {j}.to({byte}))", f"({i} - {j}) * 3_000_000_000_000_000_000", f"torch.arange({rows} * {columns}).view({rows}, {columns}).to({byte}) * 30", f"torch.arange({rows} * {columns} + 250, dtype={few})[250:].view({rows}, {columns}) % 2", f"torch.arange({rows} + {columns} - 1).unfold(0, {columns}, 1)",
            f"torch.arange({rows} + {columns} - 1).to({few})[({i} - {j}) + {columns} - 1]", f"torch.arange(5).to({byte})[({i} - {j}).clamp(-2, 2) + 2] - 3", f"torch.arange(5)[({i} - {j}).clamp(-2, 2)]", f"(torch.arange(5) - 2).roll(1)[({i} - {j}).clamp(-2, 2)]",
        )  # fmt: skip
    a, b = vector(w, rows), vector(w, columns)
    return w.one(
        f"{a}[:, None] >= {b}", f"{a}[:, None] == {b}", f"{a}[:, None] < {b}", f"{a}[:, None] * {b}", f"{a}[:, None] + {b}", f"{a}[:, None] != {b}", f"torch.logical_and({a}[:, None], {b})", f"torch.logical_xor({a}[:, None], {b})",
    )  # fmt: skip


def predicate(w: Writer, rows: Length, columns: Length) -> str:
    """The name of a boolean matrix: which scores to keep."""
    m = matrix(w, rows, columns)
    n = w.one(0, 0, 1, 2, 3, -1, 0.5, 100, 128, 255, 256, 257, 2048)
    return w.exactly(w.one(
        f"{m}.bool()", f"{m} != 0", f"{m} == 0", f"{m} > {n}", f"{m} <= {n}", f"{m} == {n}", f"{m} >= {n}", f"{n} > {m}", f"torch.logical_not({m})", f"{m}.to(torch.bool)", f"{m}.logical_not().logical_not()", f"{m}.ne({n})",
    ))  # fmt: skip


def small(w: Writer, m: str) -> str:
    """The name of such elements, so small that one may add them to scores, or multiply by them."""
    return w.exactly(w.one(
        f"{m}.clamp(-2, 2)", f"{m}.clamp(-3, 3) * 0.5", f"{m}.sign()", f"{m}.bool()", f"({m} > 0)", f"({m} != 0).float()", f"{m}.float().clamp(-2, 2)", f"({m} == 1).byte()", f"{m}.clamp(0, 1).to(torch.bfloat16)", f"({m} % 3)", f"({m} % 3).to(torch.float16) * 0.3",
    ))  # fmt: skip


def truth(w: Writer) -> str:
    """One boolean: a factor, or something to add."""
    x = w.extra(*w.one((), (1,)))
    return w.one("torch.tensor(True)", "torch.full((1,), True)", "torch.ones(1, 1, dtype=torch.bool)", f"({x}.detach() > 0)", f"{x}.detach().bool()", "torch.tensor([True])",
                 "torch.tensor(3, dtype=torch.uint8)", "torch.full((1,), 2)", "torch.tensor(2, dtype=torch.int8)", "torch.tensor(0.1).half()", "torch.tensor(0.3, dtype=torch.bfloat16)", "torch.tensor(0.3, dtype=torch.float64)")  # fmt: skip


def moved(w: Writer, t: str, n: int, length: str) -> str:
    """What leaves a tensor as it is, or nearly, or moves it along its last axis, of n elements."""
    mode = w.one("'reflect'", "'replicate'", "'circular'")
    return w.one(
        f"{t}.view(torch.int16 if {t}.dtype.itemsize == 2 else torch.int32).view({t}.dtype)", f"{t}.to(torch.float8_e4m3fn).to({t}.dtype)", f"{t}.to(torch.int8).to({t}.dtype)", f"{t}.long().to({t}.dtype)",
        f"torch.cat([{t}, {t} * 2], -1)[..., -{n}:]", f"{t}[..., -{n}:]", f"{t}[..., -1:] + {t}", f"{t} - {t}[..., -1, None]", f"{t}[..., -{length}:]", f"F.pad({t}, (2, 0))[..., -{length}:]", f"F.pad({t}, (1, 0))[..., :-1]", f"F.pad({t}, (1, 1))[..., 1:-1]", f"F.pad({t}, (-1, 1), value=0.5)",
        f"F.pad({t}.reshape(1, -1, {n}), (1, 0), mode={mode})[..., :-1].view({t}.shape)", f"F.pad({t}.reshape(1, -1, {n}), (0, 1), mode={mode})[..., 1:].view({t}.shape)", f"{t}[..., torch.arange({n}).flip(0)]", f"{t}[..., torch.arange({n}) - {n}]", f"{t}.gather(-1, torch.zeros_like({t}, dtype=torch.long))",
        f"{t}.take_along_dim({t}.argsort(-1), -1)", f"{t}.half().to({t}.dtype)", f"{t} + ({t} > 0)", f"{t} * ({t} > 0)", f"{t} + {t}.bool()", f"{t} * {t}.sign().to(torch.int8)", f"{t}.roll(-{n}, -1)", f"{t}.narrow(-1, -{n}, {n})", f"{t}.unfold(-1, 1, 1)[..., -1]", f"{t}.select(-1, -1).unsqueeze(-1).expand_as({t})",
    )  # fmt: skip
