"""Train one config several times, which under train.deterministic must give the same bits, and find what first differs.

    python tools/compare_repeats.py --config llama_350m --steps 8 --set recipe=quartet2 --set 'data.train=[my/prefix]'
    python tools/compare_repeats.py ... --repeats 3 --graphs 1 --at-once --trace 1,2
    python tools/compare_repeats.py ... --processes 2 --set comm.grad_reduce=nvfp4

Each repeat is a job of its own. Every rank writes a line a step: the loss, the gradients' norm, and fingerprints (64
bits, of all bytes with their places) of every gradient and every weight. In the steps of --trace it also notes, in the
order of execution, what each quantizer and GEMM of the recipe's linears was given and what it made; where that stays
equal up to an operation that made something else of equal operands, this operation is at fault, else what lies before
it. --graphs repeats replay CUDA graphs (train.cuda_graph: true) from the third step on, and are not traced.
Two lines a repeat are printed, everything is under --out. Exit code 1 when a repeat failed or differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import launcher, new_folder, run_to, short_run, tail

if TYPE_CHECKING:
    from torch import Tensor

    from fp4dist.kernels.registry import Kernel
    from fp4dist.nn.apply import AppliedRecipe

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]  # a step of a rank
_SPREAD = -7046029254386353131  # 2^64 over the golden ratio, odd
_BESIDE = ("lost", "inside")  # of operands: counters, and bits that follow from the rest


def main() -> int:
    """Command line."""
    args = _parse()
    if args.worker is not None:
        return _work(json.loads(args.worker.read_text(encoding="utf-8")))
    names = [*(f"eager_{i}" for i in range(args.repeats)), *(f"graph_{i}" for i in range(args.graphs))]
    out = new_folder(args.out, names, names, "--repeats")
    with ThreadPoolExecutor(len(names) if args.at_once else 1) as pool:
        failures = list(pool.map(lambda name: _run(name, args, out), names))
    different = False
    for name, failure in zip(names, failures, strict=True):
        told = (
            [] if failure is None else [f"{name}: FAILED: {failure}; the end of its log:\n{tail(out / f'{name}.log')}"]
        )
        told += _against(out, names[0], name, args.processes)
        different |= failure is not None or any("differ" in line for line in told)
        print("\n".join(told), flush=True)
    return int(different)


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", default="llama_350m", help="a run file, or the name of a shipped one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--repeats", type=int, default=2, help="jobs without CUDA graphs; the first is what others equal"
    )
    parser.add_argument("--graphs", type=int, default=0, help="jobs that replay CUDA graphs")
    parser.add_argument(
        "--trace", type=_numbers, default=(), help="steps, from 1, whose operations are noted, as in 1,2"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--at-once", action="store_true", help="run all jobs side by side on the same GPUs")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one job")
    parser.add_argument("--out", type=Path, default=Path("runs/repeats"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _run(name: str, args: argparse.Namespace, out: Path) -> str | None:
    """Run one repeat; why it failed, or None."""
    graph = "true" if name.startswith("graph") else "false"
    sets = [
        "train.deterministic=true", f"train.cuda_graph={graph}", *short_run(args.steps, min(1, args.steps - 1), out),
        *args.set, "train.eval_samples=0", f"data.cache_dir={out / name / 'data_cache'}",
        f"run.name={name}", f"run.dir={out / name}",
    ]  # fmt: skip
    plan = {"config": args.config, "sets": sets, "trace": [] if graph == "true" else list(args.trace)}
    path, start = out / f"{name}.json", [sys.executable] if args.processes == 1 else launcher(args.processes)
    path.write_text(json.dumps(plan), encoding="utf-8")
    return run_to(out / f"{name}.log", [*start, str(Path(__file__).resolve()), "--worker", str(path)], args.timeout)[0]


# -- a rank of a repeat


@dataclass
class Notes:
    """Fingerprints of what the operations of plans are given and make, while `on`."""

    on: bool = False
    names: list[str] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)

    def watch(self, applied: AppliedRecipe) -> None:
        """Note what every kernel of the model's plans does."""
        for target in applied.targets:
            plan, path = target.module.plan, target.site.path
            if plan is None:
                continue
            plan.kernels = {slot: self._noting(f"{path} {slot}", kernel) for slot, kernel in plan.kernels.items()}
            plan.pair = plan.pair and self._noting(f"{path} dgrad.dy + wgrad.dy", plan.pair)
            plan.pair_x = plan.pair_x and self._noting(f"{path} fprop.x + wgrad.x", plan.pair_x)

    def _noting(self, name: str, kernel: Kernel) -> Kernel:
        def run(*given: Any, **named: Any) -> Any:
            if not self.on:
                return kernel.fn(*given, **named)
            before = fingerprint([*tensors_of(given), *tensors_of(named)])  # before: it may add to one of them
            made = kernel.fn(*given, **named)
            self.names.append(name)
            self.found += [before, fingerprint(list(tensors_of(made)))]
            return made

        return replace(kernel, fn=run)

    def told(self) -> list[tuple[str, int, int]]:
        """(operation, what it was given, what it made) since the last call."""
        values = read(self.found)
        told = list(zip(self.names, values[::2], values[1::2], strict=True))
        self.names, self.found = [], []
        return told


def _work(plan: Mapping[str, Any]) -> int:
    """One rank of one repeat: a line for each step into rank<n>.jsonl."""
    sys.path.insert(0, str(ROOT))
    from fp4dist import env
    from fp4dist.spec.load import load_run
    from fp4dist.train import data, loop
    from fp4dist.train.world import open_world

    logging.basicConfig(level=logging.INFO if env.rank() == 0 else logging.WARNING, format="%(message)s")
    config = loop.resolve_dtype(load_run(plan["config"], plan["sets"]))
    with open_world(config) as world:
        data.ensure_prepared(config)
        datasets = data.build_datasets(config, world.dp_size)
        engine, applied = loop.build_engine(config, world)
        notes = Notes()
        if plan["trace"]:
            notes.watch(applied)
        place = {"dp_rank": world.dp_rank, "dp_size": world.dp_size, "cp_rank": world.cp_rank, "cp_size": world.cp_size}
        batches = data.train_iterator(datasets, config, consumed_samples=0, **place)
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank{world.rank}.jsonl").open("w", encoding="utf-8") as file:
            for step in range(1, config.train.steps + 1):
                applied.set_step(step - 1, config.train.steps)
                notes.on = step in plan["trace"]
                result, _ = loop.timed_step(engine, applied, step, batches)
                row = {"step": step, "operations": notes.told(), "loss": result.loss, **_parameters(applied)}
                file.write(json.dumps({**row, "grad_norm": result.grad_norm}) + "\n")
                file.flush()
        print(getattr(engine, "graphs", "eager"))
        engine.close()
    return 0


def _parameters(applied: AppliedRecipe) -> dict[str, dict[str, int]]:
    """Fingerprints of gradients and of weights after a step, by name."""
    named = [(f"{i}.{n}", p) for i, (chunk, _) in enumerate(applied.chunks) for n, p in chunk.named_parameters()]
    grads = [(name, getattr(p, "main_grad", p.grad)) for name, p in named]
    kinds = {"gradients": [(n, g) for n, g in grads if g is not None], "weights": named}
    return {
        kind: dict(zip((n for n, _ in pairs), read([fingerprint([t]) for _, t in pairs]), strict=True))
        for kind, pairs in kinds.items()
    }  # fmt: skip


def tensors_of(operand: Any) -> Iterator[Tensor]:
    """The tensors of an operand, of results or arguments, in a fixed order; not the counters beside carriers."""
    import torch

    if isinstance(operand, torch.Tensor):
        yield operand
    elif is_dataclass(operand):
        for f in fields(operand):
            if f.name not in _BESIDE and f.name != "moment":
                yield from tensors_of(getattr(operand, f.name))
    elif isinstance(operand, tuple) and hasattr(operand, "_fields"):  # a Want has nothing but memory and counters
        return
    elif isinstance(operand, tuple | list):
        for part in operand:
            yield from tensors_of(part)
    elif isinstance(operand, dict):
        for part in operand.values():
            yield from tensors_of(part)


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """[] int64 of all bytes and sizes of all tensors: words times numbers of their places, added up modulo 2^64."""
    import torch

    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    for t in tensors:
        flat = t.detach().contiguous().reshape(-1).view(torch.uint8)
        filled = flat.new_zeros(flat.numel() + -flat.numel() % 8)
        filled[: flat.numel()] = flat
        words = filled.view(torch.int64)
        places = torch.arange(1, words.numel() + 1, device=t.device)
        total = total * 31 + ((words ^ (words >> 29)) * (places * _SPREAD | 1)).sum() + flat.numel()
    return total


def read(found: Sequence[Tensor]) -> list[int]:
    """Numbers on their devices, as a list."""
    import torch

    return (
        torch.stack([t.cpu() for t in found] if len({t.device for t in found}) > 1 else list(found)).tolist()
        if found
        else []
    )


# -- the comparison


def _against(out: Path, first: str, name: str, processes: int) -> list[str]:
    """What of `name` differs from `first`, on each rank."""
    told = []
    for rank in range(processes):
        one, other = (_rows(out / n / f"rank{rank}.jsonl") for n in (first, name))
        losses = " ".join(f"{row['loss']:.4f}" for row in other)
        told.append(f"{name} rank {rank}: {len(other)} steps, losses {losses}")
        if name != first and one and other:
            told.append(f"    {difference(one, other) or f'equal to {first} in every loss, gradient and weight'}")
    return told


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def difference(one: Sequence[Row], other: Sequence[Row]) -> str | None:
    """The first step in which two repeats differ, and what of it; None where nothing does."""
    for a, b in zip(one, other, strict=False):
        found = [text for what in (_operations, _loss, _gradients, _norm, _weights) if (text := what(a, b)) is not None]
        if found and _operations(a, b) is None and a["operations"] and b["operations"]:
            found.insert(0, "all operations of the linears are equal")
        if found:
            return f"differ from step {a['step']} on: {'; '.join(found)}"
    return None if len(one) == len(other) else f"differ in their steps: {len(one)}, {len(other)}"


def _operations(a: Row, b: Row) -> str | None:
    pairs = list(zip(a["operations"], b["operations"], strict=False))  # a repeat with graphs has none
    unlike = [i for i, (p, q) in enumerate(pairs) if list(p) != list(q)]
    if not unlike:
        return None
    (name, given, _), (name_b, given_b, _) = pairs[unlike[0]]
    what = "was given something else" if given != given_b else "made something else of equal operands"
    where = f"number {unlike[0] + 1} of {len(pairs)}, {name}" + (f" (there {name_b})" if name != name_b else "")
    return f"{len(unlike)} operations, the first is {where}, which {what}"


def _of_numbers(name: str, key: str) -> Callable[[Row, Row], str | None]:
    def told(a: Row, b: Row) -> str | None:
        found, there = repr(a[key]), repr(b[key])  # of which a NaN equals another
        return None if found == there else f"{name} {found} and {there}"

    return told


def _of_parameters(kind: str) -> Callable[[Row, Row], str | None]:
    def told(a: Row, b: Row) -> str | None:
        names = list(a[kind])
        unlike = [n for n in names if a[kind][n] != b[kind].get(n)]
        if not unlike:
            return None
        shown = ", ".join([*unlike[:1], "...", *unlike[-1:]] if len(unlike) > 2 else unlike)
        return f"{len(unlike)} of {len(names)} {kind} ({shown})"

    return told


_gradients, _weights = _of_parameters("gradients"), _of_parameters("weights")
_loss, _norm = _of_numbers("loss", "loss"), _of_numbers("gradient norm", "grad_norm")


if __name__ == "__main__":
    sys.exit(main())
