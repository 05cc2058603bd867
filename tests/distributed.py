"""Run a function on several gloo ranks of this machine and get the results, or the first error, back.

    def sum_of_ranks(offset: int) -> float:          # at module level, so that a rank can import it
        x = torch.tensor(float(dist.get_rank() + offset))
        dist.all_reduce(x)
        return x.item()

    assert run_ranks(sum_of_ranks, 2, 10) == [21.0, 21.0]

Every call uses fresh processes, so no state (process groups, Megatron's globals, environment) leaks between tests.
They are forked from one server process that has imported torch and Megatron-core already: the first call costs those
imports once, the others a fraction of a second. Ranks see no GPU: what runs here is the CPU path on every machine.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from multiprocessing import connection, forkserver
from multiprocessing.managers import SyncManager
from typing import Any

import torch
import torch.distributed as dist

from fp4dist import env as fp4dist_env

PRELOAD = (
    "torch",
    "numpy",
    "pytest",
    "megatron.core.dist_checkpointing",
    "fp4dist.train.engine_megatron",
    "fp4dist.train.loop",
)
GRACE_S = 3.0  # after the first error, for the other ranks to report theirs instead of being stopped in a collective


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback, `error` the exception if it travels."""

    def __init__(self, message: str, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.error = error


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 180.0,
    init: bool = True,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `fn(*args)` on `world` ranks and return the results in rank order.

    fn       a function at module level; it asks torch.distributed for its rank. Its result is pickled by value
    timeout  seconds for all ranks together, imports included
    init     False leaves init_process_group to `fn`, as deepspeed.init_distributed wants it;
             RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in either case
    env      more environment variables of the ranks
    raises   RankError when a rank raises, dies or is not done in time; no process is left behind
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", **(env or {})}
        store = os.path.join(folder, "store") if init else None
        ranks = [_start(rank, fn, args, shared, store) for rank in range(world)]
        try:
            return _collect(ranks, timeout, getattr(fn, "__name__", str(fn)))
        finally:
            for process, _ in ranks:
                _end(process)


def free_port() -> int:
    """A TCP port that nothing listens on, below those that the kernel hands to connections (from 32768 on).

    A port that the kernel chose may belong to another test's connection before the started program listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


@contextlib.contextmanager
def megatron_groups(
    tp: int = 1, pp: int = 1, cp: int = 1, seed: int = 1234, ep: int = 1, etp: int = 1
) -> Generator[Any]:
    """Megatron's process groups over the default group, on the CPU, for one `with` block; yields parallel_state.

    Several blocks, one after the other, may share one process group. Also seeds the RNG tracker.
    """
    from fp4dist.megatron.cpu import install_cpu_shims

    install_cpu_shims()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tp,
        pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    try:
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()


Rank = tuple[Any, connection.Connection]


def _start(rank: int, fn: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], store: str | None) -> Rank:
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    # not a daemon: a rank may start processes of its own, as dist_checkpointing.save does
    process = context.Process(target=_main, args=(theirs, pickle.dumps((fn, args)), env, store), daemon=False)
    process.start()
    theirs.close()
    return process, ours


def _end(process: Any) -> None:
    """Let a rank that has answered exit, then kill its process group: Megatron's checkpoint writer is its child."""
    process.join(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _context() -> Any:
    """The forkserver context; its server is started without GPUs, which its children then cannot see either."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        forkserver.ensure_running()
    finally:
        if hidden is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    return context


def _main(pipe: connection.Connection, work: bytes, env: dict[str, str], store: str | None) -> None:
    """One rank: set up, run, send ("done", result) or ("failed", traceback, exception)."""
    os.setsid()  # a process group of its own, see _end
    os.environ.update(env)
    torch.set_num_threads(1)
    fp4dist_env.cores = lambda: 1  # a run would take all (train/world.py), beside the other tests' processes
    gc.freeze()  # what was imported before: Megatron collects garbage at every save
    _hand_over_write_results(pipe)
    try:
        fn, args = pickle.loads(work)
        if store is not None:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"])
            )
            dist.barrier()  # a rank that is done at once must not leave while others still connect to it
        answer = pickle.dumps(("done", fn(*args), None))
    except BaseException as error:  # whatever it is, the parent has to hear of it
        answer = _pickle_failure(error)
    pipe.send_bytes(answer)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _hand_over_write_results(pipe: connection.Connection) -> None:
    """Fork the process through which Megatron's checkpoint writer answers; it would spawn one that imports torch anew.

    Without `pipe`, whose end tells the parent that this rank has died.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(pipe.close)
    assert filesystem_async._results_queue is None
    filesystem_async._results_queue = manager.Queue()


def _pickle_failure(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(Exception):  # an exception may hold what cannot be pickled, or not be rebuilt
        answer = pickle.dumps(("failed", text, error))
        pickle.loads(answer)
        return answer
    return pickle.dumps(("failed", text, None))


def _collect(ranks: list[Rank], timeout: float, name: str) -> list[Any]:
    """Wait for every rank's answer; on the first failure wait GRACE_S longer, then raise all of them."""
    deadline = time.monotonic() + timeout
    waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    results: list[Any] = [None] * len(ranks)
    failures: dict[int, tuple[str, BaseException | None]] = {}
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            try:
                status, answer, error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank][0].join(GRACE_S)
                status, answer, error = "failed", f"died with exit code {ranks[rank][0].exitcode}", None
            if status == "done":
                results[rank] = answer
            else:
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                failures[rank] = (answer, error)
    if failures:
        text = "\n".join(f"rank {rank} of {len(ranks)}: {failures[rank][0]}" for rank in sorted(failures))
        first = next(iter(failures.values()))[1]
        raise RankError(f"{name}: {text}", first) from first
    if waiting:
        raise RankError(f"{name}: ranks {sorted(waiting.values())} of {len(ranks)} were not done after {timeout:g} s")
    return results
