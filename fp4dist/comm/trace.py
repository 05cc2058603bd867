"""What torch's profiler saw on the wire in one step, held against what was booked: nothing travels twice.

    with profiled() as seen:
        result = engine.train_step(...)
    faults = judge(seen.collectives, decisions, booked)      # no faults: compressed buckets went as codes, and only so

Coded messages are uint8 all-to-alls, or all-gathers of two ranks. Gradients in high precision go by collectives that
reduce. On NCCL calls of groups of one rank are left out, and `kernels` has its kernels by name as well.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fp4dist.comm.ledger import Account
from fp4dist.comm.policy import SMALL, Decision

_REDUCE = ("allreduce", "reduce")  # in the names of collectives that sum
_CODES = "unsigned char"


class Seen(NamedTuple):
    """A call of a collective. dtype is empty where the profiler does not tell it: of lists of tensors.

    elements   of what this rank puts in
    """

    name: str
    dtype: str
    elements: int

    @property
    def reduces(self) -> bool:
        """Whether it sums."""
        return any(word in self.name for word in _REDUCE)


@dataclass
class Trace:
    """collectives   calls, in order;  kernels   of NCCL: how often each ran, and its microseconds in all."""

    collectives: list[Seen] = field(default_factory=list)
    kernels: dict[str, tuple[int, float]] = field(default_factory=dict)


@contextmanager
def profiled() -> Iterator[Trace]:
    """Profile what runs inside; the Trace is filled at the end."""
    found = Trace()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        yield found
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    found.collectives = list(_collectives(events))
    found.kernels = _kernels(events)


def _collectives(events: Sequence[Mapping[str, Any]]) -> Iterator[Seen]:
    alone = [(event["tid"], event["ts"]) for event in events if _is_of_one(event)]
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "cpu_op" or not name.startswith("c10d::") or _holds(event, alone):
            continue
        dims, types = event["args"].get("Input Dims", []), event["args"].get("Input type", [])
        tensors = [(shape, kind) for shape, kind in zip(dims, types, strict=False) if shape]
        if tensors:
            shape, kind = tensors[1] if "base" in name and len(tensors) > 1 else tensors[0]  # (out, in) of those
            listed = kind == "TensorList"
            elements = sum(_numel(s) for s in shape) if listed else _numel(shape)
            yield Seen(name.removeprefix("c10d::"), "" if listed else kind, elements)


def _is_of_one(event: Mapping[str, Any]) -> bool:
    """Whether NCCL's process group notes with it that its group is one rank, such as tensor parallelism's of size 1."""
    return event.get("name") == "record_param_comms" and event.get("args", {}).get("Group size") == 1


def _holds(event: Mapping[str, Any], inner: Iterable[tuple[Any, float]]) -> bool:
    """Whether one of the (thread, time) lies in `event`."""
    first, last = event["ts"], event["ts"] + event.get("dur", 0.0)
    return any(thread == event["tid"] and first <= time <= last for thread, time in inner)


def _numel(shape: Sequence[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _kernels(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.get("cat") == "kernel" and "nccl" in str(event.get("name", "")).lower():
            count, us = found.get(event["name"], (0, 0.0))
            found[event["name"]] = count + 1, us + float(event.get("dur", 0.0))
    return found


def judge(collectives: Sequence[Seen], decisions: Sequence[Decision], booked: Account, ranks: int) -> list[str]:
    """What contradicts that compressed gradients travelled as codes alone; of a step whose only coded direction they
    are, without canaries.

    booked   the ledger's account of this rank for the step;  ranks   of a group that reduces
    """
    codes = sum(c.elements * ((ranks - 1) if "gather" in c.name else 1) for c in collectives if c.dtype == _CODES)
    scattered = codes == booked.coded + booked.exact  # exact runs of a reduce-scatter are messages, too
    faults = []
    if not scattered and codes != booked.coded:
        faults.append(
            f"{codes:,} bytes of codes in the trace, {booked.coded:,} coded and {booked.exact:,} exact booked"
        )
    gradients = [d for d in decisions if d.direction == "grad_reduce"]
    padded = (d.numel + SMALL for d in gradients if d.wire is None)
    plain = sum(padded) + sum(0 if scattered else d.numel - d.coded for d in gradients if d.wire is not None)
    long = [c for c in collectives if c.reduces and c.elements >= SMALL]
    reduced = sum(c.elements for c in long)
    if reduced > plain:
        faults.append(f"{reduced:,} elements are reduced in high precision, at most {plain:,} should be: {long}")
    sizes = {d.numel for d in gradients if d.wire is not None} | {d.coded for d in gradients if d.wire is not None}
    faults += [f"{c} is as long as a compressed bucket" for c in long if c.elements in sizes]
    if not codes and any(d.wire is not None for d in gradients):
        faults.append("no codes in the trace: the profiler saw no collective of this process")
    return faults
