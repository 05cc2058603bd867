"""RunConfig: every cross-field rule that needs no machine, and the defaults that later issues lean on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fp4dist.errors import ConfigError
from fp4dist.spec.build import build
from fp4dist.spec.run import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrepareConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)

MODEL: dict[str, Any] = {
    "name": "m", "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
    "vocab_size": 512, "seq_length": 64,
}  # fmt: skip
RUN: dict[str, Any] = {
    "run": {"name": "r"},
    "model": MODEL,
    "data": {"train": ["tokens"]},
    "optim": {"lr": 1e-3},
    "train": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2},
    "recipe": {"name": "bf16"},
}
TRAIN: dict[str, Any] = RUN["train"]


def run_with(**sections: dict[str, Any]) -> RunConfig:
    return build(RunConfig, {**RUN, **{k: {**RUN.get(k, {}), **v} for k, v in sections.items()}})


def watching(rounding: str, *controls: dict[str, Any]) -> dict[str, Any]:
    """A recipe that watches its weights."""
    w = {"format": "nvfp4", "rounding": rounding}
    rules = [{"path": "*", "linear": "l"}]
    return {"name": "w", "linears": {"l": {"fprop": {"w": w}}}, "rules": rules, "weights": list(controls)}


def test_defaults() -> None:
    config = run_with()
    assert config.run_dir == "runs/r"
    assert run_with(run={"dir": "elsewhere"}).run_dir == "elsewhere"
    assert (config.engine.kind, config.backend.kind, config.train.dtype) == ("megatron", "auto", "bf16")
    assert (config.model.query_groups, config.model.kv_channels) == (4, 16)
    assert hash(replace(config, recipe=config.recipe).parallel) == hash(config.parallel)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ((RunSection, {"name": "r", "seed": -1}), r"seed = -1 must be in \[0, 2\*\*32\)"),
        ((RunSection, {"name": "r", "seed": 2**32}), "half of the Philox key"),
        ((RunSection, {"name": ".."}), "name = '..' must name a folder under runs/; .* set dir"),
        ((RunSection, {"name": "/r"}), "name = '/r' must name a folder under runs/"),
        ((RunSection, {"name": ""}), "name = '' must name a folder under runs/"),
        ((ModelConfig, {**MODEL, "num_layers": 0}), "num_layers = 0 must be at least 1"),
        ((ModelConfig, {**MODEL, "hidden_size": 66}), "hidden_size = 66 is not a multiple of num_attention_heads = 4"),
        ((ModelConfig, {**MODEL, "num_query_groups": 3}), "4 is not a multiple of num_query_groups = 3"),
        ((ModelConfig, {**MODEL, "num_query_groups": 0}), "num_query_groups = 0 must be at least 1"),
        ((ModelConfig, {**MODEL, "num_query_groups": -2}), "num_query_groups = -2 must be at least 1"),
        ((ModelConfig, {**MODEL, "head_dim": 0}), "head_dim = 0 must be at least 1"),
        ((ModelConfig, {**MODEL, "rope_base": 0}), "rope_base = 0 must be at least 1"),
        ((ModelConfig, {**MODEL, "norm_eps": -1}), "norm_eps = -1.0 not negative"),
        ((ModelConfig, {**MODEL, "init_std": -1}), "init_std = -1.0 positive"),
        ((PrepareConfig, {"sources": []}), "sources is empty"),
        ((PrepareConfig, {"sources": ["a.txt"], "vocab_size": 256}), "vocab_size = 256 must be at least 257"),
        ((PrepareConfig, {"sources": ["a.txt"], "valid_fraction": 0.6}), r"must be in \[0, 0.5\]"),
        ((DataConfig, {}), "train is empty"),
        ((DataConfig, {"train": ["a"], "split": "1,2"}), "must be three shares"),
        ((DataConfig, {"train": ["a"], "split": "1,2,x"}), "must be three shares"),
        ((DataConfig, {"train": ["1", "a"], "prepare": {"sources": ["t"]}}), "must be the one prefix"),
        (
            (DataConfig, {"train": ["a"], "prepare": {"sources": ["t"], "valid_fraction": 0.1}}),
            r"writes 'a_valid'; set valid: \[a_valid\]",
        ),
        ((DataConfig, {"train": ["a"], "num_workers": -1}), "num_workers = -1 must not be negative"),
        ((OptimConfig, {"lr": 1, "eps": -1}), "eps = -1.0 must not be negative"),
        ((OptimConfig, {"lr": 0}), "lr > 0"),
        ((OptimConfig, {"lr": 1, "min_lr": 2}), "0 <= min_lr <= lr"),
        ((OptimConfig, {"lr": 1, "decay_fraction": 0}), r"decay_fraction = 0.0 must be in \(0, 1\]"),
        ((OptimConfig, {"lr": 1, "warmup_steps": -1}), "warmup_steps = -1 must not be negative"),
        ((OptimConfig, {"lr": 1, "clip_grad": -1}), "clip_grad = -1.0 must not be negative"),
        ((OptimConfig, {"lr": 1, "weight_decay": -1}), "weight_decay = -1.0 must not be negative"),
        ((OptimConfig, {"lr": 1, "beta2": 1}), r"beta2 = 1.0 must be in \[0, 1\)"),
        ((ParallelConfig, {"tp": 0}), "tp = 0 must be at least 1"),
        ((ParallelConfig, {"sequence_parallel": True}), "sequence_parallel needs tp > 1"),
        ((EngineConfig, {"zero_stage": 4}), "zero_stage = 4 must be 0, 1, 2 or 3"),
        ((TrainConfig, {**TRAIN, "steps": 0}), "steps = 0 must be at least 1"),
        ((TrainConfig, {**TRAIN, "global_batch_size": 7}), "7 is not a multiple of micro_batch_size = 2"),
        ((TrainConfig, {**TRAIN, "stop_after": 0}), "stop_after = 0 must be at least 1"),
        ((TrainConfig, {**TRAIN, "eval_every": -1}), "eval_every = -1 must not be negative"),
        ((CheckpointConfig, {"every": -1}), "every = -1 must not be negative"),
        ((CheckpointConfig, {"keep": 0}), "keep = 0 must be at least 1"),
        ((LoggingConfig, {"every": 0}), "every = 0 must be at least 1"),
        ((LoggingConfig, {"peak_tflops": 0}), "peak_tflops = 0.0 must be positive"),
    ],
)  # fmt: skip
def test_each_section_checks_itself(section: tuple[type, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(*section)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tp": 3}}, "^model.num_attention_heads = 4 is not divisible by parallel.tp = 3"),
        (
            {"parallel": {"tp": 4}, "model": {"num_query_groups": 2}},
            "^model.num_query_groups = 2 is not divisible by parallel.tp = 4; choose a tp",
        ),
        (
            {"parallel": {"tp": 2}, "model": {"ffn_hidden_size": 129}},
            "^model.ffn_hidden_size = 129 is not divisible by parallel.tp = 2",
        ),
        (
            {"parallel": {"tp": 2}, "model": {"hidden_size": 65, "head_dim": 16}},
            "^model.hidden_size = 65 is not divisible by parallel.tp = 2",
        ),
        ({"parallel": {"pp": 3}}, "^model.num_layers = 4 is not divisible by parallel.pp = 3"),
        (
            {"parallel": {"tp": 2, "sequence_parallel": True}, "model": {"seq_length": 63}},
            "^model.seq_length = 63 is not divisible by parallel.tp = 2, which sequence_parallel needs",
        ),
        ({"optim": {"warmup_steps": 10}}, "^optim.warmup_steps = 10 must be smaller than train.steps = 10"),
        (
            {"engine": {"kind": "deepspeed", "zero_stage": 2}, "parallel": {"pp": 2}},
            "^engine.zero_stage = 2 with parallel.pp = 2: .* use zero_stage 0 or 1, or pp 1",
        ),
        (
            {"engine": {"fp4_param_gather": True}, "recipe": watching("nearest", {"kind": "osci_reset"})},
            "^engine.fp4_param_gather: recipe w has osci_reset, which looks at whole weights, .* set fp4_param_gather",
        ),
        (
            {"engine": {"fp4_param_gather": True}, "recipe": watching("ema")},
            "^engine.fp4_param_gather: recipe w has ema, which looks at whole weights",
        ),
        (
            {"engine": {"kind": "deepspeed", "zero_stage": 1}, "recipe": watching("nearest", {"kind": "cage"})},
            "^engine.zero_stage = 1: recipe w has cage, which work on single tensors, .* or zero_stage 0",
        ),
        (
            {"recipe": watching("nearest", {"kind": "q_ramping"})},
            "^optim.clip_grad = 1.0: recipe w has q_ramping, which collects gradients .* set optim.clip_grad: 0",
        ),
    ],
)
def test_sections_check_each_other(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_with(**sections)


@pytest.mark.parametrize("stage", [0, 1])
def test_zero_0_and_1_run_under_a_pipeline(stage: int) -> None:
    assert run_with(engine={"kind": "deepspeed", "zero_stage": stage}, parallel={"pp": 2}).parallel.pp == 2


def test_nested_errors_have_their_full_path() -> None:
    with pytest.raises(ConfigError, match=r"^data.prepare.vocab_size: expected int, got '4k' \(str\)"):
        run_with(data={"prepare": {"sources": ["a"], "vocab_size": "4k"}})
    with pytest.raises(ConfigError, match=r"^parallel.sequenceparallel: unknown key .*'sequence_parallel'"):
        run_with(parallel={"sequenceparallel": True})
