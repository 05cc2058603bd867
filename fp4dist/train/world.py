"""The processes of one run: who they are, on which device, in which groups, and how they agree.

`open_world` turns the launcher's variables into a torch.distributed job with Megatron's process groups and leaves
nothing behind when the run ends. Decisions that only rank 0 can make (files, clocks) reach the others through
`World.from_rank0`, errors included, so that no rank waits for one that has already given up.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.cuda import nccl

from fp4dist import env
from fp4dist.errors import ConfigError, EnvironmentMismatch, Fp4DistError
from fp4dist.megatron.cpu import install_cpu_shims
from fp4dist.megatron.upstream import forget_aux_losses, model_parallel_cuda_manual_seed, parallel_state
from fp4dist.spec.load import config_hash
from fp4dist.spec.run import RunConfig

T = TypeVar("T")
log = logging.getLogger("fp4dist")
_TIMEOUT = timedelta(hours=1)  # of a collective; a checkpoint of rank 0 may take long on a slow disk
_PIPELINE_SEED_STRIDE = 100  # Megatron's: pipeline stages draw different initial weights


@dataclass(frozen=True, slots=True)
class World:
    """One process's place. dp counts replicas of the model, cp the ranks that share the sequences of one replica."""

    rank: int
    size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and the log."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True on every rank when it is True on one."""
        if self.size == 1:
            return flag
        answer = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer.item())

    def from_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give its result, or its Fp4DistError or OSError, to every rank."""
        box: list[object] = [None, None]
        if self.is_first:
            try:
                box[0] = work()
            except (Fp4DistError, OSError) as e:
                box[1] = e
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        if isinstance(box[1], BaseException):
            raise box[1]
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.any(False)  # unlike dist.barrier it names the device, so NCCL need not guess


def check_sizes(config: RunConfig, world_size: int) -> int:
    """The data-parallel size of `world_size` processes; raises ConfigError when something does not divide."""
    p = config.parallel
    shards = p.tp * p.pp * p.cp
    if world_size % shards:
        raise ConfigError(
            f"WORLD_SIZE = {world_size} is not a multiple of parallel.tp * pp * cp = {p.tp} * {p.pp} * {p.cp} ="
            f" {shards}; start a multiple of {shards} processes or change parallel.*"
        )
    dp = world_size // shards
    t = config.train
    if t.global_batch_size % (t.micro_batch_size * dp):
        raise ConfigError(
            f"train.global_batch_size = {t.global_batch_size} is not a multiple of"
            f" train.micro_batch_size * data parallel = {t.micro_batch_size} * {dp} = {t.micro_batch_size * dp};"
            " all ranks run equally many micro-batches: change one of them or the number of processes"
        )
    micro_batches = t.global_batch_size // (t.micro_batch_size * dp)
    if p.vpp > 1 and micro_batches % p.pp:
        raise ConfigError(
            f"train.global_batch_size = {t.global_batch_size} gives every rank {micro_batches} micro-batches, which is"
            f" not a multiple of parallel.pp = {p.pp}, as the interleaved schedule (parallel.vpp = {p.vpp}) needs;"
            " change the batch sizes, or set vpp: 1"
        )
    if (world_size // p.pp) % p.ep:
        raise ConfigError(
            f"parallel.ep = {p.ep} does not divide the {world_size // p.pp} ranks of a pipeline stage (WORLD_SIZE /"
            " parallel.pp), over which the experts are spread; change ep or the number of processes"
        )
    return dp


@contextmanager
def open_world(config: RunConfig) -> Iterator[World]:
    """Join the job and build Megatron's groups; on exit undo what was done here.

    A process group that already exists (tests, notebooks) is used and left alone. After an error that is not ours other
    ranks may be waiting in a collective, so nothing is taken down: the process ends, and the launcher ends the others.
    """
    dp = check_sizes(config, dist.get_world_size() if dist.is_initialized() else env.world_size())
    device = _device(config)
    mine = not dist.is_initialized()
    if mine:
        env.ensure_launch_variables()
        env.check_signature()
        # a process alone meets nobody: without a port there is none that another program could take first
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if env.world_size() == 1 else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT, **alone)
    try:
        if mine:
            check_environments(config)
        _set_threads(device)
        with _repeatable(config.train.deterministic):
            yield _megatron_groups(config, device, dp)
    except Fp4DistError:
        _close(mine)
        raise
    _close(mine)


def check_environments(config: RunConfig | None = None) -> None:
    """Raise EnvironmentMismatch on every rank when what they must share is not the same on all of them.

    That is managed variables (env.MANAGED), versions, and `config` as far as it decides what is computed. A variable of
    NCCL that one rank lacks hangs or slows the whole job, and nothing else tells.
    """
    mine = env.managed() | _versions() | ({"hash of the configuration": config_hash(config)} if config else {})
    told = _differences(mine)
    if told:
        raise EnvironmentMismatch(
            f"environment: {told}; export the same values on every node (the launch files of"
            " `python -m fp4dist.cluster launch` do)"
        )


def _differences(mine: dict[str, str]) -> str:
    """What the first rank that differs from rank 0 has otherwise; empty where all are equal.

    It travels through the rendezvous's store: NCCL with other variables on one rank may hang in its first collective.
    Rank 0 alone reads what all wrote, so that a job of thousands costs thousands of messages, not their square.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    call = store.add(f"fp4dist/environment/calls/{rank}", 1)
    here = f"fp4dist/environment/{call}"
    store.set(f"{here}/values/{rank}", json.dumps(mine))
    store.set(f"{here}/digest/{rank}", env.digest(mine))
    if rank == 0:
        digests = (store.get(f"{here}/digest/{r}").decode() for r in range(ranks))
        odd = next((r for r, digest in enumerate(digests) if digest != env.digest(mine)), None)
        theirs = json.loads(store.get(f"{here}/values/{odd}")) if odd is not None else mine
        names = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        told = ", ".join(f"{n} = {mine.get(n, 'unset')} / {theirs.get(n, 'unset')}" for n in names)
        store.set(f"{here}/told", f"rank 0 and rank {odd} differ: {told}" if names else "")
    return store.get(f"{here}/told").decode()


def _versions() -> dict[str, str]:
    """What computes and communicates."""
    found = {"torch": str(torch.__version__), "CUDA": str(torch.version.cuda)}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, nccl.version()))
    return found


def _device(config: RunConfig) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if config.parallel.tp > 1 and env.serialize_device_queues():
        log.info("CUDA_DEVICE_MAX_CONNECTIONS=1 is set: tensor-parallel collectives start in the order of their launch")
    if config.comm is not None and config.comm.active and env.put_transfers_first():
        log.info("TORCH_NCCL_HIGH_PRIORITY=1 is set: transfers of coded pieces come before the coding of the next ones")
    ranks, count = max(env.local_world_size(), env.local_rank() + 1), torch.cuda.device_count()
    if ranks > count:
        raise ConfigError(
            f"{ranks} processes on this host, which shows {count} GPUs; start at most {count} here"
            " (--num_gpus or --nproc-per-node)"
        )
    if config.train.deterministic:
        env.ask_for_deterministic_kernels()
    device = torch.device("cuda", env.local_rank())
    torch.cuda.set_device(device)
    return device


@contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """Inside, nothing adds with atomics, on a CPU either; afterwards, for the next run of this process, as before.

    Of torch's attention only flash (its backward can be told) and plain math stay.
    """
    if not wanted:
        yield
        return
    cuda = torch.backends.cuda
    before = torch.get_deterministic_debug_mode(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_cudnn_sdp(False)
    log.info("train.deterministic: kernels with atomic sums and fusions by torch.compile are off")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cuda.enable_mem_efficient_sdp(before[1])
        cuda.enable_cudnn_sdp(before[2])


def _set_threads(device: torch.device) -> None:
    """Share the host's cores among its processes; launchers leave one thread, which starves a run on CPU."""
    cores, ranks = env.cores(), env.local_world_size()
    threads = max(1, cores // ranks)
    torch.set_num_threads(threads)
    log.info("%s, %d cores / %d ranks on this host = %d CPU threads each", device.type, cores, ranks, threads)


def _megatron_groups(config: RunConfig, device: torch.device, dp: int) -> World:
    install_cpu_shims()
    p = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=1,
        order=p.order,
        create_gloo_process_groups=False,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    seed = (config.run.seed + _PIPELINE_SEED_STRIDE * stage) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    rank = parallel_state.get_data_parallel_rank()
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        dp_rank=rank,
        dp_size=dp,
        device=device,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=p.cp,
    )


def _close(mine: bool) -> None:
    parallel_state.destroy_model_parallel()
    forget_aux_losses()
    if mine and dist.is_initialized():
        dist.destroy_process_group()
