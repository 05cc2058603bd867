"""The checks of this folder on NCCL ranks: one line each, exit code 1 where one failed. Nothing here is timed.

    python -m tests.comm_adapters.on_gpus                    # all groups, a rank on each GPU
    python -m tests.comm_adapters.on_gpus zero hook          # some of them
    python -m tests.comm_adapters.on_gpus --cpu 2 levels     # the same program over gloo

Groups are dealt to so many starts of the ranks as --starts says, which run beside each other; a start runs its groups
one after another, since importing the engines takes as long as most of them. Runs are those of `test_engines`: coded
ones must learn as exact ones do and send the bytes that were announced.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist

from fp4dist.comm import trace
from fp4dist.comm.codec import Noise
from fp4dist.comm.collectives import slices_of
from fp4dist.comm.exchange import Options
from fp4dist.comm.hierarchy import GroupTree
from fp4dist.comm.levels import bytes_of_all_reduce
from fp4dist.spec.communication import Canary, CommConfig
from fp4dist.spec.wire import BF16_WIRE, FP32_WIRE, Wire
from tests.comm_adapters import test_ddp_hook as hook
from tests.comm_adapters import test_engines as engines
from tests.train.tiny_run import tiny_run, write_counting_tokens

QUIET = ("train.fusions=none", "train.deterministic=true")  # nothing to tune, and equal runs are equal
P2P = ("comm.pp_forward={kind: nvfp4, rounding: nearest, rotation: 128}", "comm.pp_backward=nvfp4")
Found = list[tuple[str, str]]  # what was checked, why it failed or nothing


def main() -> int:
    """Start the groups, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=sorted(GROUPS), help=f"of {', '.join(sorted(GROUPS))}")
    parser.add_argument("--cpu", type=int, default=0, metavar="RANKS", help="gloo ranks instead of GPUs")
    parser.add_argument("--timeout", type=float, default=100.0, help="seconds for all")
    parser.add_argument("--starts", type=int, default=3, help="sets of ranks beside each other")
    parser.add_argument("--rank-of", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        return be_rank(args.rank_of, cpu=args.cpu > 0)
    world, until = args.cpu or torch.cuda.device_count(), time.monotonic() + args.timeout
    dealt = [names for i in range(args.starts) if (names := args.groups[i :: args.starts])]
    started = [(names, start(names, world, args)) for names in dealt]
    return max([end(names, *ranks, until) for names, ranks in started])


Ranks = tuple["subprocess.Popen[bytes]", IO[bytes]]  # of a start, and what they print


def start(names: list[str], world: int, args: argparse.Namespace) -> Ranks:
    """The ranks of some groups."""
    ranks = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [*ranks, "-m", "tests.comm_adapters.on_gpus", "--cpu", str(args.cpu), "--rank-of", *names]
    more = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if args.cpu else {"NCCL_NVLS_ENABLE": "0"}
    log = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe that nobody reads yet would hold the ranks up)
    environment = os.environ | more | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment), log


def end(names: list[str], process: subprocess.Popen[bytes], printed: IO[bytes], until: float) -> int:
    """Print what some groups have found, and where one failed its errors."""
    late = False
    try:
        process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        late = True
        process.terminate()  # torchrun ends its ranks
        process.wait()
    printed.seek(0)
    log = printed.read().decode(errors="replace").splitlines()
    lines = [line for line in log if line.startswith(("check ", "group "))]
    ended = [name for name in names if any(line.startswith(f"group {name}: passed") for line in lines)]
    failed = process.returncode != 0 or len(ended) < len(names)
    errors = [line for line in log if "Error" in line and "ChildFailed" not in line][-4:]
    left = f"{'not done in time' if late else 'FAILED'}: {', '.join(n for n in names if n not in ended)}"
    print("\n".join([*lines, *(errors or log[-6:] if failed else []), *([left] if failed else [])]), flush=True)
    return int(failed)


def be_rank(names: list[str], *, cpu: bool) -> int:
    """One rank of some groups; rank 0 prints."""
    began, local = time.monotonic(), int(os.environ["LOCAL_RANK"])
    if not cpu:
        torch.cuda.set_device(local)
    dist.init_process_group("gloo" if cpu else "nccl")
    failures = 0

    def tell(text: str) -> None:
        if dist.get_rank() == 0:
            print(f"{text} [{time.monotonic() - began:.0f} s]", flush=True)

    for name in names:
        tell(f"group {name}: begins")
        faults = be_rank_of(name, cpu, local, tell)
        tell(f"group {name}: {'FAILED' if faults else 'passed'}")
        failures += faults
    dist.destroy_process_group()
    return int(failures > 0)


def be_rank_of(name: str, cpu: bool, local: int, tell: Callable[[str], None]) -> int:
    """Run the checks of a group and tell each; how many failed."""
    failures = 0
    with tempfile.TemporaryDirectory() as own, plain_runs():
        folders = [own]
        dist.broadcast_object_list(folders, device=None if cpu else torch.device("cuda", local))
        if dist.get_rank() == 0:
            write_counting_tokens(Path(own))
        dist.barrier()
        for what, why in GROUPS[name](folders[0]):
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, why)
            bad = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
            failures += bool(bad)
            tell(f"check {name}: {what}: {'; '.join(bad) or 'ok'}")
        dist.barrier()
    return failures


@contextmanager
def plain_runs() -> Iterator[None]:
    """Runs of `test_engines` with QUIET."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "tiny_run", lambda folder, *sets, **more: tiny_run(folder, *QUIET, *sets, **more))
        yield


def trained(folder: str, cases: dict[str, tuple[str, ...]], reference: str = "exact") -> Found:
    """Runs of these overrides: each learns as the reference does and sends what was announced."""
    found = []
    results = engines.train_all(folder, {name: (*sets, *engines.LONG) for name, sets in cases.items()})
    exact = results[reference][0]
    for name, (losses, announced, sent, lines) in results.items():
        if name == reference:
            found.append((name, "" if engines.late(exact) < exact[0] - 0.3 else f"does not learn: {exact}"))
            continue
        gap = engines.late(losses) / engines.late(exact) - 1
        why = [f"gap {gap:+.2%}"] if abs(gap) > 0.01 else []
        why += ["the same losses as without coding"] if losses == exact else []
        why += [f"sent {sent}, announced {engines.STEPS * announced}"] if sent != engines.STEPS * announced else []
        step = lines[-1].get("bytes_sent") or {}
        coded = sum(account["coded"] for account in step.values())
        why += [] if coded else ["nothing was coded in the last step"]
        found.append((f"{name} ({gap:+.2%}, {coded:,} bytes coded a step)", ", ".join(why)))
    return found


def gradients(folder: str) -> Found:
    """Megatron's reduce-scatter on several wires."""
    feedback = ("comm.grad_reduce=int4", "comm.error_feedback=ef")
    return trained(folder, {
        "exact": (), "mseden": (engines.MSEDEN,), "rtn": (engines.RTN, "comm.pairs=all_gather"), "ef": feedback,
        "bf16": ("train.dtype=bf16", "engine.overlap=false", engines.MSEDEN),
    })  # fmt: skip


def zero(folder: str) -> Found:
    """DeepSpeed's reductions, each stage."""
    cases = {name: (*sets, engines.MSEDEN) for name, sets in engines.ZERO.items()}
    bf16 = (*engines.ZERO["zero1"], "train.dtype=bf16", engines.MSEDEN)
    return trained(folder, {"exact": (), **cases, "zero1_bf16": bf16})


def pipeline(folder: str) -> Found:
    """Stage to stage."""
    pp = ("parallel.pp=2",)
    return trained(folder, {"exact": (), "pp": (*pp, *P2P)})


def interleaved(folder: str) -> Found:
    """The same with two chunks a stage."""
    vpp = ("parallel.pp=2", "parallel.vpp=2", "model.num_layers=4", "optim.lr=2.0e-3")
    return trained(folder, {"exact": vpp, "vpp": (*vpp, *P2P)})


def sequence(folder: str) -> Found:
    """Sums over tensor-parallel ranks, also of recomputed layers."""
    four = (*engines.SP, "comm.sp_reduce_scatter=nvfp4")
    cases = {"exact": (), "fp8": (*engines.SP, "comm.sp_reduce_scatter=fp8"), "nvfp4": four}
    return trained(folder, cases | {"recomputed": (*four, "train.recompute=full")})


def experts(folder: str) -> Found:
    """Tokens to experts and back."""
    coded = (*engines.EXPERTS, "comm.ep_dispatch=nvfp4_nearest", "comm.ep_combine=fp8")
    return trained(folder, {"exact": engines.EXPERTS, "experts": coded})


def weights(folder: str) -> Found:
    """Changes of weights: under both engines, and equal bits on all ranks after every update."""
    sets = ("comm.param_gather=nvfp4_nearest",)
    zero1 = (*engines.ZERO["zero1"], *sets)
    found = trained(folder, {"exact": (), "megatron": sets, "zero1": zero1})
    same, distances = engines.weights_of_all_ranks(folder)
    found.append(("all ranks hold the same bits", "" if same else "they differ"))
    drift = distances[-1] < 1.5 * max(distances[2:6])
    return [*found, ("errors do not add up", "" if drift else f"distances {distances}")]


def once(folder: str) -> Found:
    """Gradients travel once: no collective of a step carries a compressed bucket in high precision as well."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_backend() == "nccl":  # which notes groups of one rank: those reduce a value for each token
            patch.setattr(trace, "SMALL", 16)
        seen, announced, (traced, twice, unsent) = engines.collectives_of_a_step(folder)
    plain = [call for call in seen if "reduce_scatter" in call[0] or call[0] == "reduce"]
    long = [call for call in seen if call[0] == "all_reduce" and call[2] >= engines.SMALL]
    sent = sum(numel for name, _, numel in seen if name == "all_to_all_single")
    return [
        ("no plain reduction", f"{plain + long}" if plain + long else ""),
        ("bytes are those announced", "" if sent == announced else f"{sent}, announced {announced}"),
        ("the profiler's trace", "; ".join(traced)),
        ("which can fail", "" if twice and unsent else f"{twice} {unsent}"),
    ]


def guard(folder: str) -> Found:
    """The guard acts, error feedback and weights put aside resume bit for bit, validation stops."""
    found = engines.guarded(folder)
    fallen = [line for line in found["fallen"] if "loss" in line]
    resumed = [line["loss"] for line in found["fallen_resumed"] if "loss" in line]
    stopped = "the coded and the exact reduction part" in found.get("validated", "")
    checks = {
        "the guard acts": [bool(line["bytes_sent"]) for line in fallen] == [True] + [False] * 5,
        "and is resumed": [line["loss"] for line in fallen] == resumed,
        "kept under Megatron": found["kept"] == found["kept_resumed"],
        "kept under ZeRO 1": found["kept_zero"] == found["kept_zero_resumed"],
        "validation stops": stopped,
    }
    return [(what, "" if right else "no") for what, right in checks.items()]


def ddp(folder: str) -> Found:
    """Torch's DDP."""
    exact, coded, corrected, _ = hook.train_four()
    found = []
    for name, run in (("coded", coded), ("corrected", corrected)):
        gap = sum(run["losses"][-10:]) / sum(exact["losses"][-10:]) - 1
        same = run["losses"] == exact["losses"]
        found.append((f"{name} ({gap:+.2%})", "" if abs(gap) < 0.01 and not same else f"gap {gap}, same {same}"))
    total = coded["account"].coded + coded["account"].exact
    found.append(("bytes", "" if total == coded["announced"] else f"{total}, announced {coded['announced']}"))
    copies: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(copies, [w.cpu() for w in coded["weights"]])
    same = all(torch.equal(a, b) for other in copies for a, b in zip(other, copies[0], strict=True))
    found.append(("all ranks hold the same bits", "" if same else "they differ"))
    if dist.get_world_size() == 4:
        levels = hook.train(CommConfig(grad_reduce="nvfp4", canary=Canary(every=1), hierarchy=(2, 2)), steps=6)
        sent, announced = levels["account"].coded + levels["account"].exact, levels["announced"]
        found.append(("two levels", "" if sent == announced else f"{sent} bytes, announced {announced}"))
    return found


def levels(folder: str) -> Found:
    """Collectives on two levels of every split of the ranks: near the mean, equal bits, bytes of the formula."""
    world, found = dist.get_world_size(), []
    for inside in [k for k in range(1, world + 1) if world % k == 0]:
        tree = GroupTree.of_ranks(inside)
        for inner, outer in ((FP32_WIRE, FP32_WIRE), (BF16_WIRE, Wire()), (Wire(), Wire())):
            for options in (Options(), Options(pieces=2, pairs="all_gather")):
                what = f"{inside} x {world // inside} ranks, {inner.label()} / {outer.label()}, {options.pairs}"
                found.append((what, ", ".join(on_two_levels(tree, inside, inner, outer, options))))
    return found


def on_two_levels(tree: GroupTree, inside: int, inner: Wire, outer: Wire, options: Options) -> Iterator[str]:
    """What is wrong with a reduce-scatter and an all-reduce."""
    world, rank, worst = dist.get_world_size(), dist.get_rank(), 1e-10 if outer.plain else 0.06
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    n, noise = 40_000 * world, Noise(1, 2, 3)
    x = torch.randn(n, generator=torch.Generator().manual_seed(rank)).to(device)
    exact = x.clone()
    dist.all_reduce(exact)
    exact = exact / torch.tensor(float(world), device=device)
    out = torch.empty(n // world, device=device)
    handle = tree.reduce_scatter(out, x, inner, outer, noise, options=options)
    mine = exact.view(world, -1)[rank]
    if float((out - mine).norm() / mine.norm()) ** 2 > worst:
        yield "reduce-scatter is not near the mean"
    if handle.bytes_sent != handle.bytes_formula:
        yield f"reduce-scatter sent {handle.bytes_sent} bytes, not {handle.bytes_formula}"
    short = x[776:].clone()
    handle = tree.all_reduce(short, inner, outer, noise, options=options)
    if float((short - exact[776:]).norm() / exact.norm()) ** 2 > worst:
        yield "all-reduce is not near the mean"
    formula = bytes_of_all_reduce([t.numel() for t in slices_of(short, world)], rank, inside, inner, outer)
    if handle.bytes_sent != formula:
        yield f"all-reduce sent {handle.bytes_sent} bytes, not {formula}"
    copies = [torch.empty_like(short) for _ in range(world)]
    dist.all_gather(copies, short)
    if not all(torch.equal(copies[0], copy) for copy in copies):
        yield "ranks differ"


GROUPS: dict[str, Callable[[str], Found]] = {
    "gradients": gradients, "zero": zero, "pipeline": pipeline, "interleaved": interleaved, "sequence": sequence,
    "experts": experts, "weights": weights, "once": once, "guard": guard, "hook": ddp, "levels": levels,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
