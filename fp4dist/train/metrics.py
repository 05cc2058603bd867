"""Numbers of a run: one record a step, written to as many sinks as the run has.

metrics.jsonl is always there: one JSON object a line with step, loss, lr, grad_norm, tokens_per_s, and val_loss where
the model was evaluated. A number that is not finite is null, a skipped step says `"skipped": true`, and the first step
of a phase says `"phase": "NAME: why it started"`. `lost` counts what FP8 carriers could not hold in the step.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fp4dist.spec.run import RunConfig

log = logging.getLogger("fp4dist")

# Dense bf16 TFLOP/s of one device by a word of its name, from NVIDIA's data sheets; the first that matches.
_PEAK_TFLOPS = {
    "GB300": 2500.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX PRO 6000": 504.0,
}


_NESTED = ("bytes_sent", "canary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known after a step; None where it does not apply.

    step 0 is the untrained model: it has only val_loss. seconds: of the step, evaluation and saving excluded.
    """

    step: int
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None  # per device, model FLOPs
    mfu: float | None = None
    val_loss: float | None = None
    seconds: float | None = None
    skipped: bool = False
    grad_noise: float | None = None  # gradient over its quantization noise, measured before the step
    lost: int | None = None  # elements that FP8 carriers could not hold; only where there are any
    inexact: bool = False  # skipped for those alone
    phase: str | None = None  # the phases that started with this step, each with its reason
    refused: bool = False  # skipped because the autopilot said so
    autopilot: str | None = None  # what the autopilot did or advised, each with its cause
    bytes_sent: dict[str, dict[str, int]] | None = None  # of rank 0: direction -> coded, exact, plain, extra
    fallback: str | None = None  # buckets that leave their wire after this step, each with the reason
    canary: list[dict[str, Any]] | None = None  # reductions that were run both ways, see fp4dist.comm.canary

    def to_json(self) -> dict[str, Any]:
        """Known fields; non-finite numbers as null."""
        out: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                out[name] = None
            elif value is not None and value is not False:
                out[name] = value
        return out


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonlSink:
    """metrics.jsonl, a line a record, each flushed.

    resume_at   lines of later steps are dropped first (they belong to work that was lost); -1 drops all
    """

    def __init__(self, path: Path, resume_at: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] <= resume_at]
        tmp = path.with_suffix(".tmp")
        tmp.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(tmp, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line."""
        self._file.write(json.dumps(record.to_json()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorboardSink:
    """TensorBoard events in <run folder>/tensorboard."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_at + 1 if resume_at >= 0 else 0)

    def write(self, record: Record) -> None:
        """One scalar a field, text for text."""
        for name, value in record.to_json().items():
            if isinstance(value, str):
                self._writer.add_text(_tag(name), value, record.step)
            elif name not in ("step", *_NESTED) and value is not None:
                self._writer.add_scalar(_tag(name), float(value), record.step)
        for name, value in wire_scalars(record):
            self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Weights & Biases; the run id stays in the run folder, so that a resumed run continues its curves."""

    def __init__(self, folder: Path, config: RunConfig, resolved: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(wandb.util.generate_id(), encoding="utf-8")
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.run.name,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(folder),
            config=resolved,
        )

    def write(self, record: Record) -> None:
        """One log call a record."""
        values = {_tag(k): v for k, v in record.to_json().items() if k not in ("step", *_NESTED) and v is not None}
        self._run.log(values | dict(wire_scalars(record)), step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class ConsoleSink:
    """One line every `every` steps, and for every evaluation and skipped step."""

    def __init__(self, every: int, steps: int) -> None:
        self._every, self._steps = max(every, 1), steps
        self._pace: list[float] = []  # seconds of the latest steps

    def write(self, record: Record) -> None:
        """Log the record, if its turn has come."""
        if record.seconds is not None:
            self._pace = [*self._pace[-49:], record.seconds]
        due = record.step % self._every == 0 or record.step in (1, self._steps)
        if due or record.val_loss is not None or record.skipped:
            log.info("%s", self._line(record))

    def close(self) -> None:
        """Nothing to close."""

    def _line(self, r: Record) -> str:
        parts = [f"step {r.step:>{len(str(self._steps))}}/{self._steps}"]
        if r.loss is not None:
            parts += [f"loss {r.loss:.4f}", f"lr {r.lr or 0:.2e}", f"grad norm {r.grad_norm or 0:.3f}"]
            parts.append(f"{r.tokens_per_s or 0:,.0f} tokens/s")
        if r.tflops is not None:
            parts.append(f"{r.tflops:.2f} TFLOP/s" + (f" (MFU {r.mfu:.1%})" if r.mfu is not None else ""))
        if len(self._pace) > 2 and r.step < self._steps:  # the first step compiles, loads and allocates
            parts.append(f"ETA {_clock((self._steps - r.step) * sorted(self._pace)[len(self._pace) // 2])}")
        if r.val_loss is not None:
            parts.append(f"validation loss {r.val_loss:.4f}")
        if r.skipped:
            why = f"{r.lost} elements did not fit FP8 carriers" if r.inexact else "loss or gradient is not finite"
            why = "refused by the autopilot" if r.refused else why
            parts.append(f"SKIPPED: {why}")
        return " | ".join(parts)


def wire_scalars(record: Record) -> Iterator[tuple[str, float]]:
    """(tag, value) of what a `comm:` section sent in a step and of its canaries."""
    for direction, account in (record.bytes_sent or {}).items():
        for name, count in account.items():
            yield f"wire/{direction}/{name}_bytes", float(count)
    for finding in record.canary or ():
        for name, value in finding.items():
            if name != "what":
                yield f"canary/{finding['what']}/{name}", float(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out, a missing file is empty."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def peak_tflops(config: RunConfig, device_name: str) -> float | None:
    """Dense bf16 peak of one device: logging.peak_tflops, else by name, else unknown."""
    if config.logging.peak_tflops is not None:
        return config.logging.peak_tflops
    return next((peak for word, peak in _PEAK_TFLOPS.items() if word in device_name), None)


def _tag(name: str) -> str:
    training = ("loss", "lr", "grad_norm", "grad_noise", "phase", "autopilot")
    return f"{'validation' if name == 'val_loss' else 'training' if name in training else 'speed'}/{name}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
