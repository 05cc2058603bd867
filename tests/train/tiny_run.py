"""A complete run of a GPT of 0.1 M parameters on token files that can be learned, for tests of the training loop."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fp4dist.spec.load import load_run
from fp4dist.spec.run import RunConfig
from fp4dist.train import loop
from tests.megatron.tiny import MODEL
from tests.train.token_runs import write_tokens

VOCAB = 128
ENGINES = ("megatron", "deepspeed")
FP4 = "nvidia_nvfp4"


def write_counting_tokens(folder: Path) -> Path:
    """Token files that tiny_run reads: documents that count upwards in steps of 1 to 7. Returns `folder`."""
    rng = np.random.default_rng(0)
    documents = [
        (rng.integers(0, VOCAB) + rng.integers(1, 8) * np.arange(rng.integers(40, 90))) % VOCAB for _ in range(80)
    ]
    write_tokens(folder / "counting", documents)
    return folder


def tiny_run(folder: Path, *overrides: str, name: str = "run") -> RunConfig:
    """Six steps of four samples in micro-batches of two, fp32, bf16 recipe; `overrides` as for --set.

    `folder` holds what write_counting_tokens wrote; runs of other names share it.
    """
    prefix = folder / "counting"
    raw: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / name)},
        "model": MODEL | {"vocab_size": VOCAB},
        "data": {"train": [str(prefix)], "split": "80,20,0", "cache_dir": str(folder / "cache")},
        "optim": {"lr": 8.0e-3, "warmup_steps": 1},
        "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "dtype": "fp32",
                  "eval_every": 3, "eval_samples": 4},
        "recipe": "bf16",
        "logging": {"tensorboard": False},
    }  # fmt: skip
    file = folder / f"{name}-{os.getpid()}.yaml"  # several ranks may do this at once
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load_run(file, overrides)


def run_without_picture(config: RunConfig) -> loop.RunSummary:
    """loop.run without its picture, which takes as long as the training of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_curves", lambda *_: None)
        return loop.run(config)


def other_dir(config: RunConfig, folder: Path) -> RunConfig:
    """The same run in another folder."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))


def with_overrides(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """`config` with fields of one section replaced."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    text = (Path(config.run_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(
    config: RunConfig, keys: Sequence[str] = ("step", "loss", "lr", "grad_norm", "val_loss")
) -> list[tuple[Any, ...]]:
    """What must be reproducible of metrics.jsonl, bit for bit: everything but times."""
    return [tuple(line.get(key) for key in keys) for line in metrics(config)]


def losses(config: RunConfig) -> list[float]:
    """The training losses in order."""
    return [line["loss"] for line in metrics(config) if "loss" in line]
