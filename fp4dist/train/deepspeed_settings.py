"""DeepSpeed's configuration: what fp4dist decides, and what a run passes through with `engine.deepspeed`.

The run's own keys come first: a setting that fp4dist derives from them is refused in `engine.deepspeed`, so that no
value is said twice. Everything else (ZeRO++, offload, buckets, monitors ...) is merged in and checked by DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn

from fp4dist.errors import ConfigError
from fp4dist.spec.run import RunConfig
from fp4dist.train.world import World

Settings = dict[str, Any]

_LARGEST_BUCKET = 200_000_000  # elements; DeepSpeed allocates what it is told, also for a small model
_FIXED = "nothing: fp4dist needs its own value there"
DECIDED = {  # setting -> what decides it
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": _FIXED,
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "optim.schedule, optim.warmup_steps and optim.min_lr",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types.grad_accum_dtype": _FIXED,
    "zero_allow_untested_optimizer": _FIXED,
    "zero_optimization.stage": "engine.zero_stage",
    "activation_checkpointing": "train.recompute",
    "tensor_parallel": "parallel.tp",
    "pipeline": "parallel.pp",
    "expert_parallel": "parallel.ep",
    "sequence_parallel_size": "parallel.cp",
    "checkpoint.load_universal": "checkpoint.load, the checkpoint that holds the universal folder",
}
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
_BUILD_ERRORS = (AssertionError, ImportError, OSError, RuntimeError, ValueError)


def make_settings(config: RunConfig, world: World, model: nn.Module, dtype: torch.dtype, mpu: Any) -> Settings:
    """The dict that DeepSpeed gets instead of its configuration file.

    model    gives the size of buckets;  dtype   torch.bfloat16 or torch.float32, of parameters
    raises   ConfigError for a setting that fp4dist decides, that DeepSpeed does not know or take, or that this machine
             cannot run
    """
    passed = config.engine.deepspeed
    _refuse_decided(passed)
    settings = _merge(_own_settings(config, world, model, dtype), passed)
    if passed:
        _check_with_deepspeed(settings, mpu)
        _check_pipeline(config, passed)
        _check_quantized(settings)
    return settings


def flattened(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf."""
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{path}.")
        else:
            yield path, value


def clips_itself(config: RunConfig) -> bool:
    """Whether the engine has to take the gradient norm and clip.

    DeepSpeed's norm without ZeRO is wrong under model parallelism: in fp32 it leaves out replicated parameters of all
    pipeline stages but the first, in bf16 (0.19.8) it no longer knows which gradients are shards or copies.
    """
    return config.engine.zero_stage == 0


def _own_settings(config: RunConfig, world: World, model: nn.Module, dtype: torch.dtype) -> Settings:
    t, stage, parallel = config.train, config.engine.zero_stage, config.parallel
    bucket = min(_LARGEST_BUCKET, sum(p.numel() for p in model.parameters()))
    micro_batches = t.global_batch_size // (t.micro_batch_size * world.dp_size)
    whole_step = parallel.pp > 1  # Megatron's schedule accumulates: to DeepSpeed a step is one large micro-batch
    settings: Settings = {
        "train_micro_batch_size_per_gpu": t.micro_batch_size * (micro_batches if whole_step else 1),
        "gradient_accumulation_steps": 1 if whole_step else micro_batches,
        "gradient_clipping": 0.0 if clips_itself(config) else config.optim.clip_grad,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device before each micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload runs our AdamW too
        "zero_optimization": {
            "stage": stage,
            # reducing during backward means after one micro-batch, and a pipeline has several of them under way
            "overlap_comm": world.device.type == "cuda" and world.dp_size * parallel.cp > 1 and not whole_step,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["communication_data_type"] = "fp32"
        if stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _merge(settings: Settings, passed: Settings) -> Settings:
    """`settings` with the leaves of `passed` over it."""
    merged = dict(settings)
    for key, value in passed.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _refuse_decided(passed: Settings) -> None:
    """A decided setting, anything below one, or a non-section in the place of one's section."""
    for path, value in flattened(passed):
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            prefix = ".".join(parts[:length])
            if prefix in DECIDED:
                raise ConfigError(f"engine.deepspeed.{path}: fp4dist sets {prefix}; use {DECIDED[prefix]} instead")
        if not isinstance(value, dict) and any(key.startswith(f"{path}.") for key in DECIDED):
            raise ConfigError(f"engine.deepspeed.{path} = {value!r} must be a section with keys")


class _Asked(dict[str, Any]):
    """A dict that notes which keys are looked up: DeepSpeed keeps no list of its settings, but it asks for each."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def _check_with_deepspeed(settings: Settings, mpu: Any) -> None:
    """Let DeepSpeed read the settings; what it does not take or never asks for is an error."""
    asked = _Asked(settings)
    try:
        DeepSpeedConfig(asked, mpu)
    except ValidationError as e:
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"engine.deepspeed: DeepSpeed {deepspeed.__version__} refuses {place} in its {e.title}"
            f" ({first['msg']}); correct or remove it"
        ) from e
    except (AssertionError, TypeError, ValueError) as e:
        raise ConfigError(f"engine.deepspeed: DeepSpeed {deepspeed.__version__} refuses it ({e})") from e
    for key in settings:
        if key not in asked.asked:
            near = difflib.get_close_matches(key, asked.asked, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; remove it"
            raise ConfigError(f"engine.deepspeed.{key}: DeepSpeed {deepspeed.__version__} has no such setting{hint}")


def _check_pipeline(config: RunConfig, passed: Settings) -> None:
    if config.parallel.pp > 1 and passed.get("zero_optimization", {}).get("overlap_comm"):
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.overlap_comm = True with parallel.pp = {config.parallel.pp}: it"
            " reduces a gradient when one micro-batch is done, a pipeline has several under way; leave it out"
        )


def _check_quantized(settings: Settings) -> None:
    """ZeRO++'s quantized collectives run in CUDA kernels that DeepSpeed compiles when it first uses them."""
    wanted = [key for key in _QUANTIZED if settings["zero_optimization"].get(key)]
    if not wanted:
        return
    accelerator: Any = get_accelerator()
    try:
        builder = accelerator.create_op_builder("QuantizerBuilder")
        if builder is None:
            raise RuntimeError(f"accelerator {accelerator.device_name()} has no quantizer")
        builder.load(verbose=False)
    except (*_BUILD_ERRORS, CUDAMismatchException, MissingCUDAException) as e:
        reason = str(e).strip().splitlines()
        raise ConfigError(
            f"engine.deepspeed.zero_optimization.{wanted[0]} = True: DeepSpeed cannot build its quantizer kernels here"
            f" ({reason[0] if reason else type(e).__name__}); it needs a CUDA GPU and nvcc. Leave the key out"
        ) from e
