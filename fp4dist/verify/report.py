"""One report of everything: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fp4dist
from fp4dist.kernels import cuda
from fp4dist.verify.parity import Matrix
from fp4dist.verify.speed import Timed


def environment(device: torch.device) -> dict[str, str]:
    """What it ran on."""
    found = {"fp4dist": fp4dist.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    found["machine"] = f"{platform.machine()}, {platform.node()}"
    found["device"] = "cpu"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found["device"] = f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"
        found["CUDA"] = str(torch.version.cuda)
    found["CUDA extension"] = cuda.MISSING or "loaded"
    return found


def write(folder: Path, data: dict[str, Any]) -> tuple[Path, Path]:
    """verify.md and verify.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text, table = folder / "verify.md", folder / "verify.json"
    table.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    text.write_text(markdown(data), encoding="utf-8")
    return text, table


def of_matrix(matrix: Matrix) -> dict[str, Any]:
    """Of the parity matrix, for the report."""
    return {
        "cells": [asdict(cell) for cell in matrix.cells.values()],
        "faults": len(matrix.faults),
        "products": matrix.products,
        "largest_relative_error": matrix.largest_error,
        "fp4_products": matrix.comparable,
        "bits_of_the_published_accumulator": matrix.as_published,
    }


def of_times(copied: float, times: list[Timed]) -> dict[str, Any]:
    """Of the speeds, for the report."""
    return {"copy_bytes_per_s": copied, "times": [asdict(t) for t in times]}


def markdown(data: dict[str, Any]) -> str:
    """The report."""
    lines = [f"# fp4dist verification: {'passed' if data['passed'] else 'FAILED'}", ""]
    lines += [f"- {key}: {value}" for key, value in data["environment"].items()]
    lines += _parity(data["parity"]) if "parity" in data else []
    if "conversions" in data:
        lines += ["", "## FP4 conversion instructions", ""]
        lines += [f"- `{name}`: {text}" for name, text in data["conversions"].items()]
    lines += _speed(data["speed"]) if "speed" in data else []
    lines += _training(data["training"]) if "training" in data else []
    return "\n".join([*lines, ""])


def _parity(parity: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Bits against the reference",
        "",
        "| operation | spec | backend | calls | result |",
        "|---|---|---|---|---|",
    ]
    for cell in parity["cells"]:
        result = cell["fault"] or "equal"
        lines.append(f"| {cell['op']} | {cell['spec']} | {cell['backend']} | {cell['calls']} | {result} |")
    if parity["products"]:
        lines += [
            "",
            f"{parity['products']} products, largest relative error of one in fp32"
            f" {parity['largest_relative_error']:.1e}. Of {parity['fp4_products']} whose operands are E2M1 codes with"
            f" E4M3 scales, {parity['bits_of_the_published_accumulator']} have the bits of the published model of"
            " Blackwell's FP4 tensor cores (`fp4dist/numerics/blackwell_sums.py`).",
        ]
    return lines


def _speed(speed: dict[str, Any]) -> list[str]:
    lines = ["", "## Speed", "", f"Copy: {speed['copy_bytes_per_s'] / 1e12:.2f} TB/s, read and written.", ""]
    lines += ["| operation | backend | us | share of the roofline |", "|---|---|---|---|"]
    return lines + [f"| {t['what']} | {t['backend']} | {t['us']:.1f} | {t['share']:.2f} |" for t in speed["times"]]


def _training(runs: dict[str, Any]) -> list[str]:
    lines = ["", "## Training, 50 steps", ""]
    for name, run in runs.items():
        losses = run.get("losses") or [float("nan")]
        rate = f"{run['tokens_per_s']:.0f} tokens/s" if run.get("tokens_per_s") else ""
        told = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} {rate}" if run["ok"] else f"FAILED: {run['why']}"
        lines.append(f"- {name}: {told}")
    return lines
