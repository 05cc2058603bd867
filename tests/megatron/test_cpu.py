"""The CPU shims: everything that training needs runs with them, each one is needed, and nothing else is changed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fp4dist.megatron import cpu
from fp4dist.megatron.upstream import MEGATRON_VERSION
from tests.distributed import RankError, megatron_groups, run_ranks
from tests.megatron.tiny import SEQUENCE, loss_of, tiny_batch, tiny_experts, tiny_run

pytestmark = pytest.mark.distributed

NO_GPU = r"torch/cuda/__init__\.py.* in _lazy_init"  # whose message depends on how torch was built


def test_everything_is_known_by_name() -> None:
    shims, again, log, kept = run_ranks(install_twice, 1)[0]
    assert shims == again == tuple(cpu.SHIMS)
    assert len(log) == 1
    assert all(name in log[0] for name in shims)
    assert kept


def install_twice() -> Any:
    records: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    log = logging.getLogger("fp4dist")
    log.addHandler(Handler())
    log.setLevel(logging.INFO)
    untouched = ("zeros", "empty", "tensor", "full", "ones", "arange", "manual_seed", "get_rng_state")
    before = [getattr(torch, name) for name in untouched] + [Tensor.type, Tensor.to, torch.cuda.manual_seed]
    first, second = cpu.install_cpu_shims(), cpu.install_cpu_shims()
    after = [getattr(torch, name) for name in untouched] + [Tensor.type, Tensor.to, torch.cuda.manual_seed]
    return first, second, records, all(a is b for a, b in zip(before, after, strict=True))


def test_a_gpu_run_is_never_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    assert cpu.install_cpu_shims() == ()
    assert torch.cuda.current_device is before


@pytest.mark.parametrize("name", list(cpu.SHIMS))
def test_each_shim_is_needed(name: str, tmp_path: Any) -> None:
    world, scenario, error = NEEDED[name]
    if name == "current_stream" and MEGATRON_VERSION < (0, 19):
        pytest.skip("Megatron-core uses it from 0.19 on")
    with pytest.raises(RankError, match=error):
        run_ranks(without, world, name, scenario, str(tmp_path))


def without(name: str, scenario: str, folder: str) -> None:
    del cpu.SHIMS[name]
    if scenario == "tied pipeline":
        from fp4dist.megatron.provider import build_gpt

        with megatron_groups(pp=2):
            first = dist.get_rank() == 0
            config = tiny_run(pp=2, tie_embeddings=True)
            build_gpt(config, torch.float32, pre_process=first, post_process=not first, linears="megatron")
        return
    if scenario == "pieces of a sequence":
        from fp4dist.megatron.upstream import rope_utils

        with megatron_groups(cp=2) as groups:
            rope_utils.get_pos_emb_on_this_cp_rank(torch.zeros(4), 0, groups.get_context_parallel_group())
        return
    if scenario == "experts":
        with megatron_groups():
            step_with_experts()
        return
    with megatron_groups():
        run = Training()
        run.step()
        if scenario == "save":
            run.save(folder)


NEEDED = {
    "current_device": (1, "step", NO_GPU),
    "tensor_cuda": (2, "tied pipeline", NO_GPU),
    "synchronize": (1, "save", NO_GPU),
    "current_stream": (1, "step", NO_GPU),
    "rng_tracker": (1, "step", NO_GPU),
    "device_names": (1, "step", NO_GPU),
    "moe_stream": (1, "experts", rf"torch\.cuda\.Stream requires CUDA support|{NO_GPU}"),
    "moe_splits": (1, "experts", r"in _maybe_dtoh_and_synchronize"),
    "pinned_rope": (2, "pieces of a sequence", "pin_memory"),
}


def step_with_experts() -> float:
    """Forward and backward of a model with experts, Megatron's own linears."""
    from fp4dist.megatron.provider import build_gpt

    loss = loss_of(build_gpt(tiny_run(**tiny_experts()), torch.float32, linears="megatron"))
    loss.backward()
    return loss.item()


@pytest.mark.skipif(MEGATRON_VERSION >= (0, 17), reason="later versions define the name")
def test_the_router_of_0_16_needs_a_name_that_it_forgot() -> None:
    """Not a matter of the CPU: fp4dist.megatron.upstream defines it everywhere."""
    assert run_ranks(route, 1, False)[0] > 0
    with pytest.raises(RankError, match="NameError: name 'te_general_gemm' is not defined"):
        run_ranks(route, 1, True)


def route(forgotten: bool) -> float:
    from fp4dist.megatron.upstream import moe_utils

    if forgotten:
        del moe_utils.te_general_gemm
    with megatron_groups():
        return step_with_experts()


def test_only_named_constants_change() -> None:
    def sample(x: Tensor) -> Any:
        def inner() -> tuple[bool, str, str]:
            return x.type() in ["torch.cuda.FloatTensor", "torch.cuda.HalfTensor"], "not cuda", "cuda"

        return torch.ones(1, device="cuda"), inner()

    sample.__code__ = cpu._retarget(sample.__code__)
    ones, (known, text, device) = sample(torch.zeros(1))
    assert ones.device.type == "cpu"
    assert known
    assert (text, device) == ("not cuda", "cpu")


def test_named_rng_states_are_independent_streams() -> None:
    tracker = cpu.CpuRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with tracker.fork("a"):
        a = [torch.rand(1)]
        with tracker.fork("b"):
            b = [torch.rand(1)]
        a.append(torch.rand(1))
    second = torch.rand(1)
    with tracker.fork("b"):
        b.append(torch.rand(1))
    for seed, drawn in ((1, a), (2, b), (0, [first, second])):
        assert torch.equal(torch.cat(drawn), torch.rand(2, generator=torch.Generator().manual_seed(seed)))
    with pytest.raises(KeyError, match="'c' was not added"), tracker.fork("c"):
        pass
    with pytest.raises(ValueError, match="already taken"):
        tracker.add("a", 3)


def test_recomputed_dropout_is_the_same() -> None:
    assert run_ranks(recompute_dropout, 1) == [True]


def recompute_dropout() -> bool:
    from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

    def layer(x: Tensor) -> Tensor:
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(x, 0.5)

    with megatron_groups():
        x = torch.ones(64, requires_grad=True)
        y = checkpoint(layer, False, x)
        y.sum().backward()
        assert x.grad is not None
        return torch.equal(x.grad, y.detach()) and 0 < int((y == 0).sum()) < 64


@pytest.mark.parametrize("bf16", [False, True])
def test_training_and_checkpoint_with_the_distributed_optimizer(bf16: bool, tmp_path: Any) -> None:
    """DP = 2: schedule, DDP, distributed optimizer, clipping, save, load, and the same next loss after loading."""
    results = run_ranks(train_save_load, 2, bf16, str(tmp_path))
    for losses, norms, resumed in results:
        assert losses[0] > losses[-1]
        assert all(norm > 0 for norm in norms)
        assert resumed == losses[-1]
    assert results[0][1] == results[1][1]


def train_save_load(bf16: bool, folder: str) -> tuple[list[float], list[float], float]:
    with megatron_groups():
        run = Training(bf16)
        steps = [run.step() for _ in range(3)]
        run.save(folder)
        last = run.step()
        other = Training(bf16, seed=2)
        other.load(folder)
        resumed = other.step()
        losses = [loss for loss, _ in [*steps, last]]
        return losses, [norm for _, norm in steps], resumed[0]


class Training:
    """Megatron's own loop in small: model, DDP, distributed optimizer, schedule."""

    def __init__(self, bf16: bool = False, seed: int = 1) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from fp4dist.megatron.provider import build_gpt

        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model: Any = build_gpt(tiny_run(seed=seed), dtype, linears="megatron")
        config = self.model.config
        config.finalize_model_grads_func = finalize_model_grads
        wrapped = Float16Module(config, self.model) if bf16 else self.model
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.ddp: Any = DistributedDataParallel(config, ddp, wrapped)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-3, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
            ),
            [self.ddp],
            use_gloo_process_groups=False,
        )

    def step(self) -> tuple[float, float]:
        """Loss before the step and norm of its gradient."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=iter([tiny_batch(2 * i + dist.get_rank()) for i in range(2)]),
            model=[self.ddp],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=2,
            forward_only=False,
        )
        good, norm, _ = self.optimizer.step()
        assert good
        return sum(float(part["loss"]) for part in losses) / 2, float(norm)

    @staticmethod
    def forward(batches: Any, model: Any) -> Any:
        tokens, positions, labels = next(batches)
        per_token = model(tokens, positions, None, labels=labels)

        def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mean = output.float().mean()
            return mean, {"loss": mean.detach().clone()}

        return per_token, loss

    def save(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self.sharded(loading=False), folder)

    def load(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        for part in self.optimizer.chained_optimizers:
            part._init_optimizer_states_with_dummy_values()
        state = dist_checkpointing.load(self.sharded(loading=True), folder)
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])

    def sharded(self, loading: bool) -> dict[str, Any]:
        from megatron.core import parallel_state

        metadata = {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "distrib_optim_sharding_type": "dp_reshardable",
        }
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}
