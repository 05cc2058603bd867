"""Small token files and run configurations for the tests of the data pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from fp4dist.spec.load import load_recipe
from fp4dist.spec.run import DataConfig, OptimConfig, RunConfig, RunSection, TrainConfig
from tests.megatron.tiny import tiny_model

VOCAB_SIZE = 100


def random_documents(count: int, seed: int = 0, longest: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB_SIZE, rng.integers(5, longest)) for _ in range(count)]


def write_tokens(prefix: Path, documents: list[np.ndarray], dtype: Any = np.uint16) -> str:
    """Write a pair with Megatron's own builder; returns the prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for ids in documents:
        builder.add_document(torch.from_numpy(np.asarray(ids, dtype=np.int32)), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def run_config(folder: Path, data: dict[str, Any], *, seed: int = 7, seq_length: int = 16, **train: Any) -> RunConfig:
    """A run of 5 steps of 8 samples, micro-batch 2, evaluated on 4 samples."""
    train = {"steps": 5, "global_batch_size": 8, "micro_batch_size": 2, "eval_samples": 4, **train}
    return RunConfig(
        run=RunSection(name="data", dir=str(folder / "run"), seed=seed),
        model=tiny_model(vocab_size=VOCAB_SIZE, seq_length=seq_length),
        data=DataConfig(**data),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(**train),
        recipe=load_recipe("bf16"),
    )
