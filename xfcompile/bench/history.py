"""Reads what older scripts wrote: files of programs, of models, of gated MLPs, of bias-act-dropout and of decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from xfcompile.bench.results import Results

Old = Mapping[str, Any]
Entry = dict[str, Any]


def of_old(found: Old, name: str) -> Results | None:
    """The results of an older file; None where it is none of those. name: of the file, which may say what it holds."""
    readers: tuple[tuple[Callable[[Old], bool], Callable[[Old], Results]], ...] = (
        (lambda f: _first(f, "results", "rows") and "what" not in f.get("results", [{}])[0], _programs),
        (lambda f: _first(f, "results", "column"), _gated),
        (lambda f: "programs" in f and "floors" in f, _bias),
        (lambda f: "copy_gb_per_s" in f and "sizes" in f, _decode),
        (lambda f: _first(f, "rows", "backends"), _models),
    )
    for fits, read in readers:
        if fits(found):
            return read(found)
    return None


def _first(found: Old, field: str, key: str) -> bool:
    entries = found.get(field)
    return isinstance(entries, list) and bool(entries) and isinstance(entries[0], dict) and key in entries[0]


def _run(found: Old) -> dict[str, Any]:
    """Where it was measured, as the older files say it."""
    about = found.get("machine", found)
    device = about.get("device") or found.get("hardware") or f"CPU, {about.get('threads')} threads"
    versions = {name: about[name] for name in ("python", "torch", "triton", "transformers") if name in about}
    return {"hardware": {"device": device}, "versions": versions, "revision": None, "date": None, "arguments": {},
            "note": found.get("note")}  # fmt: skip


def _results(benchmark: str, title: str, found: Old, rows: list[Entry]) -> Results:
    columns = list(dict.fromkeys(column for row in rows for column in row["cells"]))
    return Results(benchmark, title, columns, runs=[_run(found)], rows=[{**row, "run": 0} for row in rows])


def _entry(name: str, mode: str, sizes: dict[str, int], cells: dict[str, Any], variant: str = "", **more: Any) -> Entry:
    return {"name": name, "mode": mode, "variant": variant, "sizes": sizes, "cells": cells, **more}


def _cell(old: Old) -> dict[str, Any]:
    names = {"ms": "ms", "gb": "peak_gb", "peak_gb": "peak_gb", "error": "error_by_eager", "failed": "failed",
             "min_ms": "least", "max_ms": "most", "rounds": "rounds", "error_to_fp32": "error",
             "first_call_s": "first_call_s", "call_ms": "call_ms", "gb_per_s": "gb_per_s"}  # fmt: skip
    return {names[key]: value for key, value in old.items() if key in names and value is not None}


def _programs(found: Old) -> Results:
    mode = {"forward and backward": "forward+backward"}.get(found.get("what", "forward"), "forward")
    rows = []
    for part in found["results"]:
        z = part["sizes"]
        sizes = {"B": z["batch"], "H": z["heads"], "S": z["length"], "D": z["dim"]}
        for row in part["rows"]:
            cells = {("xformers-triton" if k == "kernel" else k): _cell(v) for k, v in row.items()
                     if isinstance(v, dict) and k != "earlier" and v}  # fmt: skip
            rows.append(_entry(row["program"], mode, sizes, cells))
    return _results("attention", "twelve attention programs in plain PyTorch", found, rows)


def _gated(found: Old) -> Results:
    rows: dict[tuple[Any, ...], Entry] = {}
    for old in found["results"]:
        m, k, n = old["size"]
        name = old["program"]
        trained = "mlp" in name or "training" in name
        key = (name, m, k, n)
        mode = "forward+backward" if trained else "forward"
        entry = rows.setdefault(key, _entry(name.removesuffix(", training"), mode, {"M": m, "K": k, "N": n}, {}))
        column = {"triton": "xformers-triton", "cublas": "xformers-cublas"}.get(old["column"], old["column"])
        entry["cells"][column] = _cell(old)
    return _results("gated-mlp", "gated MLPs", found, list(rows.values()))


def _bias(found: Old) -> Results:
    rows: dict[tuple[Any, ...], Entry] = {}
    for old in found["programs"]:
        sizes = {"M": old["rows"], "K": old["k"], "N": old["n"]}
        column = {"triton": "xformers-triton", "epilogue": "xformers-epilogue"}.get(old["route"], old["route"])
        for field, mode in (("training step", "training step"), ("forward, no gradient", "inference")):
            entry = rows.setdefault((mode, old["program"], *sizes.values()), _entry(old["program"], mode, sizes, {}))
            cell = {"ms": old[field]}
            if mode == "training step":
                cell["peak_gb"] = old["peak"] / 1e3
            entry["cells"][column] = cell
    return _results("bias-act-dropout", "bias, activation and dropout", found, list(rows.values()))


def _decode(found: Old) -> Results:
    z = found["sizes"]
    rows = []
    for old in found["rows"]:
        mask, _, filled = old["cache"].partition(", ")
        part = float(filled.split()[0]) if filled else 1.0
        name = {"no mask": "no mask", "mask": "boolean mask", "position": "j <= position"}[mask]
        sizes = {"B": z["batch"], "H": z["heads"], "KV": z["kv_heads"], "S": z["cache"], "D": z["dim"],
                 "filled": round(part * z["cache"])}  # fmt: skip
        cells = {}
        for column, cell in old.items():
            if isinstance(cell, dict) and cell:
                made = _cell(cell)
                if "gb_per_s" in made:
                    made["of_copy"] = made["gb_per_s"] / found["copy_gb_per_s"]
                cells["xformers-triton" if column == "kernel" else column] = made
        rows.append(_entry(name, "step", sizes, cells))
    return _results("decode", "attention to a cache, one step of decoding", found, rows)


MODELS = {
    "llama": "Llama", "vit": "ViT-L 384", "llama_left_padded": "Llama, left-padded", "gpt2": "GPT-2",
    "bert": "BERT, padded", "t5": "T5 1.1", "mistral": "Mistral, window", "gemma2": "Gemma-2", "swin": "Swin-B 384",
}  # fmt: skip


def _models(found: Old) -> Results:
    """Their peaks have the model in them."""
    rows = []
    for old in found["rows"]:
        cells = {column: _cell(cell) | ({"failed": cell["error"]} if "error" in cell else {})
                 for column, cell in old["backends"].items()}  # fmt: skip
        more = {"revision": old["revision"]} if "revision" in old else {}
        if "error" in old:
            more["failed"] = old["error"]
        rows.append(_entry(MODELS.get(old["model"], old["model"]), old["mode"], {}, cells, old["attention"], **more))
    return _results("models", "whole models, unmodified", found, rows)
