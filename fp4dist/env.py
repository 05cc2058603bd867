"""The only module that reads or writes environment variables: what the launcher says about ranks, and nothing else.

`deepspeed`, torchrun and plain `python` all end in the same five variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT). Noise, seeds and numerics never depend on the environment.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping

from fp4dist.errors import ConfigError, EnvironmentMismatch

# What changes how ranks talk, allocate or compute. It must be the same on every rank of a job.
MANAGED = ("NCCL_", "TORCH_NCCL_", "NVTE_", "FP4DIST_", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF",
           "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "UCX_", "NVSHMEM_")  # fmt: skip
_PER_RANK = ("NCCL_DEBUG_FILE", "NCCL_TOPO_DUMP_FILE", "NCCL_GRAPH_DUMP_FILE")  # may name a file of each rank
_NAMES, _HASH, _RANKS = "FP4DIST_ENV_NAMES", "FP4DIST_ENV_HASH", "FP4DIST_WORLD_SIZE"


def rank() -> int:
    """This process among all of the job, from 0."""
    return _integer("RANK", 0)


def local_rank() -> int:
    """This process among those of its host, from 0."""
    return _integer("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes of the job."""
    return _integer("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Number of processes on this host; without torchrun or deepspeed the whole job is taken to be here."""
    return _integer("LOCAL_WORLD_SIZE", _integer("LOCAL_SIZE", world_size()))


def visible_gpus(count: int) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of each of the `count` GPUs that this process sees, for programs that get one."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ensure_launch_variables() -> bool:
    """Complete the five variables for a plain `python` start (one process, a free port); True when that was needed.

    Raises ConfigError when some launcher set only a part of them: guessing the rest would hang or collide.
    """
    required = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in required if name not in os.environ]
    if not missing:
        os.environ.setdefault("LOCAL_RANK", "0")
        return False
    if world_size() > 1:
        raise ConfigError(
            f"environment: WORLD_SIZE = {world_size()}, but {', '.join(missing)} is not set; start with"
            " `deepspeed launch/pretrain.py --config X`, with torchrun, or export all of them"
        )
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(s.getsockname()[1])
    return True


def managed() -> dict[str, str]:
    """The variables of this process that must be the same on every rank."""
    names = sorted(n for n in os.environ if n.startswith(MANAGED) and n not in _PER_RANK)
    return {name: os.environ[name] for name in names}


def digest(variables: Mapping[str, str]) -> str:
    """16 hex digits of names and values; launchers and ranks compute it alike."""
    text = "".join(f"{name}={variables[name]}\n" for name in sorted(variables))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def signed(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables` and the two that let a rank check that all of them arrived: their names and their digest."""
    return {**variables, _NAMES: ",".join(sorted(variables)), _HASH: digest(variables)}


def check_signature() -> None:
    """Raise EnvironmentMismatch when the launcher's variables did not all reach this process; free without a signature.

    `deepspeed` with pdsh forwards few variables, containers drop others: NCCL then silently runs with its defaults.
    """
    planned = os.environ.get(_RANKS)
    if planned is not None and planned != str(world_size()):
        raise EnvironmentMismatch(
            f"environment: {world_size()} ranks were started, the launcher planned {planned}; DeepSpeed without its"
            " hostfile starts one node alone, and so does a batch script outside its job"
        )
    names, expected = os.environ.get(_NAMES), os.environ.get(_HASH)
    if names is None or expected is None:
        return
    wanted = [name for name in names.split(",") if name]
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        raise EnvironmentMismatch(
            f"environment: rank {rank()} on {socket.gethostname()}: {', '.join(missing)} did not arrive, which the"
            " launcher set; export them there too (.deepspeed_env, srun --export=ALL, the container's environment)"
        )
    found = digest({name: os.environ[name] for name in wanted})
    if found != expected:
        raise EnvironmentMismatch(
            f"environment: rank {rank()} on {socket.gethostname()}: the values of {names} have the digest {found}, the"
            f" launcher's {expected}; a module, a profile or the container's image changes one of them"
        )


def serialize_device_queues() -> bool:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 unless it is set; True when it was set now.

    With one hardware queue kernels start in the order of their launch. Megatron's tensor-parallel layers count on it to
    put a collective before the GEMM that should hide it. Must run before CUDA is initialized.
    """
    if "CUDA_DEVICE_MAX_CONNECTIONS" in os.environ:
        return False
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return True


def put_transfers_first() -> bool:
    """Set TORCH_NCCL_HIGH_PRIORITY=1 unless it is set; True when it was set now.

    A transfer needs multiprocessors. Without priority it waits until a kernel before it, such as the coding of the next
    piece, has handed out all its blocks, and nothing overlaps. Before a process group makes its first connection.
    """
    if "TORCH_NCCL_HIGH_PRIORITY" in os.environ:
        return False
    os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"
    return True


def log_nccl_init(path: str) -> None:
    """Let NCCL write what it decides at init (transports, multi-node NVLink) to `path`. Before the first collective."""
    os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT", NCCL_DEBUG_FILE=path)


def ask_for_deterministic_kernels() -> None:
    """Set what cuBLAS and Transformer Engine's attention look at, unless it is set. Before CUDA is initialized.

    CUBLAS_WORKSPACE_CONFIG             :4096:8: cuBLAS sums alike in every run, and torch refuses to run it otherwise
    NVTE_ALLOW_NONDETERMINISTIC_ALGO    0: Megatron-core refuses deterministic_mode with any other value
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


def tell_deepspeed_there_is_no_gpu() -> None:
    """Set DS_ACCELERATOR=cpu unless it is set, so that DeepSpeed need not find out, and warn, by itself."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError as e:
        raise ConfigError(f"environment: {name} = {text!r} must be an integer; the launcher sets it") from e
