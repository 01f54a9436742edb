"""Cold and warm compile times: processes of their own, whose caches are empty, or hold what the process before left.

`python -m xfcompile.bench.startup '{"name": "Llama", ...}'` is such a process; it prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xfcompile.bench import columns as c
from xfcompile.bench.job import Place, Start

COLUMNS = (c.INDUCTOR, c.XFORMERS)
"""Those whose compile times are asked for; the others tune or have none."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def started(work: Start, columns: Sequence[str], announce: Callable[[str], None]) -> dict[str, Any]:
    """The cells of a row of compile times."""
    cells: dict[str, dict[str, Any]] = {}
    for column in columns:
        if column not in COLUMNS:
            cells[column] = {"skipped": "compile times are those of the default mode"}
            continue
        cells[column] = {}
        with tempfile.TemporaryDirectory(prefix="xfcompile-bench-") as folder:
            for state in ("cold", "warm"):
                announce(f"{column}, {state}")
                answer = process({**work.arguments, "column": column}, Path(folder))
                if "failed" in answer:
                    cells[column]["failed"] = f"{state}: {answer['failed']}"
                    break
                cells[column] |= {f"{state}_s": answer["seconds"]}
                if "sites" in answer:
                    cells[column]["sites"] = answer["sites"]
    return {"cells": cells}


def process(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a process says, with its caches in a folder."""
    env = os.environ | {name: str(folder / name.lower()) for name in CACHES}
    # The package may be importable here without being installed.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "xfcompile.bench.startup", json.dumps(arguments)]
    done = subprocess.run(command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


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
    print(json.dumps(main(json.loads(sys.argv[1]))))
