"""Cold and warm compile times: processes of their own, whose caches are empty, or hold what the process before left.

`python -m xfcompile.bench.startup` is what such processes are forked from: it has imported PyTorch and the libraries of
models, which a user's program has as well before it compiles, and used neither. It reads a line of JSON for each,
`{"arguments": {"name": "Llama", ...}, "folder": "where caches are"}`, and answers by a line. Where importing a library
has asked for GPUs, which no forked process can use then, each process begins anew, which takes it longer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from xfcompile.bench import columns as c
from xfcompile.bench.job import Place, Start

COLUMNS = (c.INDUCTOR, c.XFORMERS)
"""Those whose compile times are asked for; the others tune or have none."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
IMPORTED = ("torch", "transformers", "timm", "diffusers", "xfcompile.bench.models")
"""Where they are installed."""

Ask = Callable[[dict[str, Any], Path], dict[str, Any]]


def started(work: Start, columns: Sequence[str], announce: Callable[[str], None]) -> dict[str, Any]:
    """The cells of a row of compile times."""
    cells: dict[str, dict[str, Any]] = {}
    with processes() as ask:
        read_from_disk(work, [column for column in columns if column in COLUMNS], ask, announce)
        for column in columns:
            if column not in COLUMNS:
                cells[column] = {"skipped": "compile times are those of the default mode"}
                continue
            cells[column] = {}
            with tempfile.TemporaryDirectory(prefix="xfcompile-bench-") as folder:
                for state in ("cold", "warm"):
                    announce(f"{column}, {state}")
                    answer = ask({**work.arguments, "column": column}, Path(folder))
                    if "failed" in answer:
                        cells[column]["failed"] = f"{state}: {answer['failed']}"
                        break
                    cells[column] |= {f"{state}_s": answer["seconds"]}
                    if "sites" in answer:
                        cells[column]["sites"] = answer["sites"]
    return {"cells": cells}


def read_from_disk(work: Start, columns: Sequence[str], ask: Ask, announce: Callable[[str], None]) -> None:
    """Has each column compile the model in a tiny size, once since the machine was started: what is read of compilers
    and libraries from its disk for the first time is no column's."""
    for column in columns:
        mark = _mark(column)
        if mark.exists() or work.arguments.get("scale") == "quick":
            continue
        announce(f"{column}, its libraries")
        with tempfile.TemporaryDirectory(prefix="xfcompile-bench-") as folder:
            ask({**work.arguments, "column": column, "scale": "quick"}, Path(folder))
        with contextlib.suppress(OSError):
            mark.touch()


def _mark(column: str) -> Path:
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        started = str(os.getppid())
    return Path(tempfile.gettempdir()) / f"xfcompile-bench-{os.getuid()}-{started}-{column}"


@contextlib.contextmanager
def processes() -> Iterator[Ask]:
    """Asks a process, forked anew each time, for what it says of arguments, with its caches in a folder."""
    # The package may be importable here without being installed.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "xfcompile.bench.startup"]
    # How libraries may ask for GPUs without using them.
    env = os.environ | {"PYTHONPATH": path, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as server,
    ):  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def ask(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
            try:
                requests.write(json.dumps({"arguments": arguments, "folder": str(folder)}) + "\n")
                requests.flush()
                line = answers.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return json.loads(line)
            return {"failed": f"the process that others are forked from ended{_last_words(errors)}"}

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                requests.close()  # it ends


def _last_words(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""


def serve(requests: IO[str], answers: int) -> None:
    """Answers each request by a process forked for it, until nothing more comes. answers: a file descriptor, which
    nothing else writes to."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in requests:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _forked(request, writing)
        os.close(writing)
        with os.fdopen(reading) as file:
            answer = file.readline().strip()  # not its end: what the process has begun may hold it open
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        os.write(answers, ((answer or json.dumps({"failed": f"exit code {code}"})) + "\n").encode())


def _forked(request: dict[str, Any], answers: int) -> None:
    """Measures, answers and ends."""
    os.environ.update({name: str(Path(request["folder"]) / name.lower()) for name in CACHES})
    if request["arguments"]["device"] == "cuda" and not _can_use_gpus():
        os.set_inheritable(answers, True)
        again = [sys.executable, "-m", "xfcompile.bench.startup", str(answers), json.dumps(request)]
        os.execv(sys.executable, again)
    _answer(request, answers)


def _can_use_gpus() -> bool:
    import torch

    return not torch.cuda._is_in_bad_fork()


def _answer(request: dict[str, Any], answers: int) -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        answer = main(request["arguments"])
    except BaseException as error:
        traceback.print_exc()
        answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    os.write(answers, (json.dumps(answer) + "\n").encode())
    os._exit(0)


def _end_with(parent: int) -> None:
    """Who asked may have been ended, by a limit or a budget: then nobody wants the answer."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(arguments: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the model to the end of its first call, compilation and all."""
    import torch

    import xfcompile
    from xfcompile.bench.models import TRAIN, build, step
    from xfcompile.bench.timing import milliseconds

    device = arguments["device"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    place = Place(device, dtype, arguments["scale"])
    mode = arguments["mode"]
    model, given = build(arguments["name"], mode, arguments["attention"], place)
    x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    (x @ x).sum().backward()  # what a device and its libraries take to begin is nobody's compile time
    with torch.set_grad_enabled(mode == TRAIN), xfcompile.collect() as report:
        seconds = milliseconds(lambda: step(model, c.compiled(model, arguments["column"]), given, mode)(), device) / 1e3
    return {"seconds": seconds} | ({"sites": report.summary()} if c.ours(arguments["column"]) else {})


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if len(sys.argv) > 1:  # one that has begun anew
        _answer(json.loads(sys.argv[2]), int(sys.argv[1]))
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin, out)
