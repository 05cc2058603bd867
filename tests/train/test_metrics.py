"""Records, their lines in metrics.jsonl, and what the console says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fp4dist.train.metrics import ConsoleSink, JsonlSink, Record, TensorboardSink, peak_tflops, read_lines
from tests.train.tiny_run import tiny_run, with_overrides


def full(step: int, **values: object) -> Record:
    fields: dict[str, object] = dict(loss=2.5, lr=1e-3, grad_norm=0.75, tokens_per_s=1234.0, tflops=0.5, seconds=0.25)
    return Record(step=step, **(fields | values))  # type: ignore[arg-type]


def test_a_record_names_only_what_is_known() -> None:
    assert Record(step=0, val_loss=3.0).to_json() == {"step": 0, "val_loss": 3.0}
    assert full(1).to_json() == {
        "step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.75, "tokens_per_s": 1234.0, "tflops": 0.5, "seconds": 0.25,
    }  # fmt: skip


def test_numbers_that_are_not_finite_become_null() -> None:
    line = full(1, loss=float("nan"), grad_norm=float("inf"), skipped=True).to_json()
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["skipped"] is True
    assert "NaN" not in json.dumps(line)


def test_lines_are_complete_at_once_and_floats_survive(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_at=-1)
    loss = 0.1 + 0.2
    sink.write(full(1, loss=loss))
    assert read_lines(path)[0]["loss"] == loss, "readable before the file is closed, to the last bit"
    sink.close()


def test_resuming_drops_lost_work_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "val_loss": 4.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\nnoise\n{"step": 3, "lo'
    )
    sink = JsonlSink(path, resume_at=1)
    sink.write(full(2))
    sink.close()
    assert [line["step"] for line in read_lines(path)] == [0, 1, 2]
    assert read_lines(path)[2]["loss"] == 2.5
    JsonlSink(path, resume_at=-1).close()
    assert read_lines(path) == []


def test_the_console_has_its_rhythm(caplog: pytest.LogCaptureFixture) -> None:
    console = ConsoleSink(every=4, steps=10)
    with caplog.at_level(logging.INFO, "fp4dist"):
        logging.getLogger("fp4dist").propagate = True
        console.write(Record(step=0, val_loss=8.0))
        for step in range(1, 11):
            console.write(full(step, skipped=step == 6, val_loss=7.0 if step == 7 else None, mfu=0.25))
    shown = [int(message.split("step")[1].split("/")[0]) for message in caplog.messages]
    assert shown == [0, 1, 4, 6, 7, 8, 10]
    assert "validation loss 8.0000" in caplog.messages[0]
    line = caplog.messages[2]
    for part in (
        "loss 2.5000",
        "lr 1.00e-03",
        "grad norm 0.750",
        "1,234 tokens/s",
        "0.50 TFLOP/s (MFU 25.0%)",
        "ETA 0:00:02",
    ):
        assert part in line
    assert "SKIPPED" in caplog.messages[3]
    assert "ETA" not in caplog.messages[-1]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorboardSink(tmp_path, resume_at=-1)
    sink.write(full(1, val_loss=3.5, loss=float("nan")))
    sink.write(full(2))
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {
        "training/loss",
        "training/lr",
        "training/grad_norm",
        "validation/val_loss",
    }
    assert [e.step for e in events.Scalars("training/loss")] == [2]
    assert events.Scalars("validation/val_loss")[0].value == 3.5


def test_peaks_are_known_by_name_or_given(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    assert peak_tflops(config, "NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops(config, "NVIDIA H100 PCIe") == 756.0
    assert peak_tflops(config, "") is None
    assert peak_tflops(with_overrides(config, "logging", peak_tflops=100.0), "NVIDIA H100 PCIe") == 100.0
