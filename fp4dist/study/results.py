"""A study's runs in one small file: what its table and pictures need, without configurations and full precision curves.

results.json   {"study", "cells": [a line for each model, budget and arm], "runs": [a line for each run]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4dist.errors import DataError
from fp4dist.study.plan import Study, fingerprint, jobs, name_of
from fp4dist.study.training import Record

_KEPT = (
    "run", "study", "arm", "recipe", "recipe_hash", "hash", "model", "parameters", "block_parameters", "budget",
    "tokens", "steps", "seed", "diverged", "loss", "files", "held_out", "step_seconds", "peak_bytes", "seconds",
    "fp4_share", "left_fp8", "device",
)  # fmt: skip
_DIGITS = 5  # behind the point, of curves


def short(r: Record) -> Record:
    """The record, or what is left of one already, as results.json keeps it."""
    kept = {key: r[key] for key in _KEPT}
    kept["curve"] = [[int(step), round(loss, _DIGITS), round(norm, _DIGITS)] for step, loss, norm in r["curve"]]
    kept["torch"] = r["torch"] if "torch" in r else r["versions"]["torch"]
    kept["data"] = r["data"] if "data" in r else r["config"]["data"]
    kept["fingerprint"] = r["fingerprint"] if "fingerprint" in r else fingerprint(r["config"])
    return kept


def runs_of(study: Study, records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(the short records of the study's runs, whichever study they were made for and under whichever name; those that
    were made for it and are none of its runs as it is now).
    """
    found = {kept["fingerprint"]: kept for kept in map(short, records)}
    wanted = {job.fingerprint: job for job in jobs(study)}
    mine = [{**found[key], "run": job.name, "arm": name_of(job.arm)} for key, job in wanted.items() if key in found]
    others = [r for key, r in found.items() if r["study"] == study.name and key not in wanted]
    return mine, others


def read_results(file: Path) -> list[Record]:
    """The runs of a results.json, for `runs_of`. DataError for another file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return list(found["runs"])
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{file}: not a report's results.json ({type(e).__name__}: {e})") from e


def write_results(file: Path, study: Study, cells: Sequence[dict[str, Any]], runs: Sequence[Record]) -> None:
    """One line a cell and a run."""
    parts = [f'"study": {json.dumps(study.name)}', _lines("cells", cells), _lines("runs", runs)]
    file.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def _lines(key: str, rows: Sequence[dict[str, Any]]) -> str:
    return f'"{key}": [\n' + ",\n".join(json.dumps(row, sort_keys=True) for row in rows) + "]"
