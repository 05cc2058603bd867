"""The runs of a study in pieces: several processes share a folder of records, each on a device, until a deadline.

<out>/<study>/<run>.json       the record of a finished run
<out>/<study>/claims/<run>     the process that works on it; removed when it ends
<state>/<study>/<run>.pt       a run that the deadline cut, where pieces may be cut

A run is done where any record in <out> has its configuration, from whichever study, machine or session it came.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fp4dist.errors import DataError, Fp4DistError
from fp4dist.spec.run import BackendConfig
from fp4dist.study.plan import Job, identity, name_of
from fp4dist.study.training import FORMAT, Data, Record, Training, steps_done

log = logging.getLogger("fp4dist")
_WORTHWHILE = 20.0  # seconds: less than that of a run that will be cut is lost to its start and its state


def read_records(folder: Path) -> list[Record]:
    """Every record of a folder and the folders in it, by run. DataError for a file that is none."""
    found = []
    for file in sorted(folder.rglob("*.json")):
        if file.name in ("results.json", "failures.json"):
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DataError(f"{file}: not a record of a study (format {FORMAT}); move it out of the folder")
        found.append(record)
    return found


def clear_claims(folder: Path) -> None:
    """Forget the claims of processes that are gone. Only while no process works in the folder."""
    for claim in folder.glob("*/claims/*"):
        claim.unlink()


def work(
    jobs: Sequence[Job],
    data: Data,
    device: torch.device,
    out: Path,
    *,
    deadline: float,
    state: Path | None = None,
    last: bool = False,
    backend: BackendConfig | None = None,
) -> list[str]:
    """Take one run after the other that nobody has finished or claimed, until `deadline` (of time.monotonic).

    state     where runs that the deadline cuts are kept; None: none is cut
    last      no piece comes after this one: nothing is begun, and nothing cut is continued, that cannot end in time
    returns   what went wrong, a line for each run that fp4dist refused or that ran out of memory; the others go on
    """
    failures = []
    for job in jobs:
        if time.monotonic() >= deadline:
            break
        folder = out / job.study.name
        (folder / "claims").mkdir(parents=True, exist_ok=True)
        partial = state and state / job.study.name / f"{job.name}.pt"
        cut = partial is not None and not last
        needed = _WORTHWHILE if cut else expected(job, out, partial)
        in_time = time.monotonic() + needed <= deadline
        if is_done(job, data, out) or not in_time or not _claim(folder / "claims" / job.name):
            continue
        try:
            if is_done(job, data, out):  # by a process that has just given its claim back
                continue
            _refuse_other(folder / f"{job.name}.json")
            record = Training(job, data, device, backend).run(deadline, partial, cut=cut)
            if record is not None:
                _write(folder / f"{job.name}.json", record)
                log.info("%s", line(record))
        except (Fp4DistError, torch.cuda.OutOfMemoryError) as e:
            failures.append(f"{job.name}: {type(e).__name__}: {str(e).splitlines()[0]}")
            log.warning("%s", failures[-1])
        finally:
            (folder / "claims" / job.name).unlink()
        gc.collect()  # a model and its linears refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failures


def is_done(job: Job, data: Data, out: Path) -> bool:
    """Whether a record of this configuration and data lies in `out`, under whatever name."""
    wanted = identity(job.config(data.identity))
    return any(identity(r["config"]) == wanted for r in read_records(out))


def expected(job: Job, out: Path, partial: Path | None = None) -> float:
    """Seconds that the run will still take: as long as its arm's others of that size and budget, else as the longest
    of any arm; 0 where none is finished. A run learns its own pace after some steps and gives up if that is too slow.

    partial   where it may have been cut: what it has done then is not counted
    """
    peers = [r for r in read_records(out) if (r["model"], r["budget"]) == (job.model.name, job.tokens)]
    same = [r["seconds"] for r in peers if r["arm"] == name_of(job.arm)]
    whole = statistics.median(same) if same else max((r["seconds"] for r in peers), default=0.0)
    done = steps_done(partial) if partial is not None else None
    left = 1.0 - int(done.read_text(encoding="utf-8")) / job.steps if done is not None and done.exists() else 1.0
    return whole * left


def line(r: Record) -> str:
    """One line about a finished run."""
    loss = "diverged" if r["diverged"] else f"held-out loss {r['loss']:.4f}"
    speed = f", {r['step_seconds'] * 1e3:.0f} ms a step, {r['tokens_per_s']:,.0f} tokens/s" if r["step_seconds"] else ""
    memory = f", peak {r['peak_bytes'] / 2**30:.1f} GiB" if r["peak_bytes"] else ""
    return f"{r['run']}: {loss}, {r['seconds']:.0f} s{speed}{memory}"


def _refuse_other(file: Path) -> None:
    if file.exists():
        raise DataError(f"{file} is a record of another configuration or other data; move it out of the folder")


def _claim(file: Path) -> bool:
    try:
        with file.open("x", encoding="utf-8") as f:
            f.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def _write(file: Path, record: dict[str, Any]) -> None:
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(tmp, file)
