"""Finds out what this machine can do: versions, devices, the routes that exist here, and whether they work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from rich.table import Table

Verdict = Literal["ok", "note", "broken"]

OLDEST = {"torch": (2, 11), "triton": (3, 6)}
HEAD_DIM = 64
"""The head dimension that routes are tried with; every kernel has it."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination; "note" is a limit that one should know of, and no fault."""

    topic: str
    name: str
    found: str
    verdict: Verdict = "ok"


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    devices = _devices()
    found = [*_versions(), *_device_findings(devices)]
    for device in devices:
        found += [_sdpa(device), _triton(device), _inductor(device)]
    return [*found, _cache(), _entry_point()]


def healthy(findings: list[Finding]) -> bool:
    return all(f.verdict != "broken" for f in findings)


def table(findings: list[Finding]) -> Table:
    from rich import box
    from rich.table import Table

    styles = {"ok": "green", "note": "yellow", "broken": "bold red"}
    made = Table("", "", "found", "", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    topic = None
    for f in findings:
        made.add_row(f.topic if f.topic != topic else "", f.name, f.found, f"[{styles[f.verdict]}]{f.verdict}")
        topic = f.topic
    return made


def as_dict(findings: list[Finding]) -> dict[str, Any]:
    return {"healthy": healthy(findings), "findings": [asdict(f) for f in findings]}


# -- what there is ------------------------------------------------------------------------------------------------


def _versions() -> list[Finding]:
    found = [Finding("versions", "python", platform.python_version())]
    for name in ("xfcompile", "torch", "triton", "sympy"):
        version = _version(name)
        if version is None:
            verdict: Verdict = "note" if name == "triton" else "broken"
            found.append(Finding("versions", name, "not installed", verdict))
            continue
        oldest = OLDEST.get(name, ())
        old = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()) < oldest
        needed = f" (needs {'.'.join(map(str, oldest))} or later)" if old else ""
        found.append(Finding("versions", name, version + needed, "broken" if old else "ok"))
    return found


def _version(name: str) -> str | None:
    import xfcompile

    # Torch's has the build, which its package's metadata may leave out.
    own = {"xfcompile": xfcompile.__version__, "torch": torch.__version__}
    if name in own:
        return own[name]
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[torch.device]:
    cuda = [torch.device("cuda", k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *cuda]


def _device_findings(devices: list[torch.device]) -> list[Finding]:
    found = []
    for device in devices:
        if device.type == "cpu":
            about = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        else:
            p = torch.cuda.get_device_properties(device)
            about = f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        found.append(Finding("devices", str(device), about))
    return found


# -- the routes of attention --------------------------------------------------------------------------------------


def _sdpa(device: torch.device) -> Finding:
    """Which of SDPA's kernels take a plain call here."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    names = [b.name.lower().removesuffix("_attention") for b in backends if _runs(device, dtype, b)]
    fused = [name for name in names if name != "math"]
    verdict: Verdict = "ok" if fused else "note" if names else "broken"
    return Finding(f"attention on {device}", "sdpa", ", ".join(names) or "no kernel runs", verdict)


def _runs(device: torch.device, dtype: torch.dtype, backend: SDPBackend) -> bool:
    import warnings

    x = torch.ones(1, 2, 128, HEAD_DIM, device=device, dtype=dtype)
    try:
        with sdpa_kernel([backend]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch says at length why a kernel does not take a call
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError:
        return False
    return True


def _triton(device: torch.device) -> Finding:
    """Whether our kernels can run: compiled on CUDA, interpreted on a CPU."""
    topic = f"attention on {device}"
    if importlib.util.find_spec("triton") is None:
        return Finding(topic, "triton", "not installed: what SDPA cannot say is left to Inductor", "note")
    interpreted = device.type == "cpu"
    env = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    error = _run([sys.executable, "-m", "xfcompile.probe", str(device)], env)
    if error is not None:
        return Finding(topic, "triton", f"a small kernel fails: {error}", "broken")
    if interpreted:
        return Finding(topic, "triton", "interpreted only (TRITON_INTERPRET=1), for tests", "note")
    from xfcompile.kernels.attention import supports

    reason = supports(device, torch.bfloat16, HEAD_DIM, HEAD_DIM)
    return Finding(topic, "triton", reason or "compiles and runs", "note" if reason else "ok")


def _run(command: list[str], env: dict[str, str]) -> str | None:
    """What goes wrong with a command, if anything does."""
    # The package may be importable here without being installed.
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])])
    try:
        done = subprocess.run(command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "it did not end within two minutes"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _inductor(device: torch.device) -> Finding:
    """Whether Inductor has the compiler that it needs."""
    topic = f"attention on {device}"
    if device.type != "cpu":
        if importlib.util.find_spec("triton") is None:
            return Finding(topic, "inductor", "Triton is not installed", "broken")
        return Finding(topic, "inductor", "through Triton")
    return _checked(topic, "inductor", _cpp_compiler)


def _cpp_compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())


def _checked(topic: str, name: str, find: Callable[[], str]) -> Finding:
    try:
        return Finding(topic, name, find())
    except Exception as error:  # whatever goes wrong there is what the doctor is asked for
        return Finding(topic, name, (str(error).strip().splitlines() or [type(error).__name__])[0], "broken")


# -- what they stand on -------------------------------------------------------------------------------------------


def _cache() -> Finding:
    """Whether compiled code can be kept."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("surroundings", "cache", f"{folder}: {error.strerror or error}", "broken")
    return Finding("surroundings", "cache", f"{folder} (writable)")


def _entry_point() -> Finding:
    """Whether torch.compile finds the backend by its name."""
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if "xformers" in points.names:
        return Finding("surroundings", "backend", 'torch.compile(..., backend="xformers") finds it')
    return Finding(
        "surroundings", "backend", "not installed: pass backend=xfcompile.xformers, or pip install xfcompile", "note"
    )
