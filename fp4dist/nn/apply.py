"""apply_recipe: rules -> layers, kernels resolved, everything said. Asking for FP4 and getting none is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from fp4dist.errors import ConfigError, RecipeMismatch
from fp4dist.nn.assign import Assignments, assign, check_shapes
from fp4dist.nn.carry import resolve_carrying
from fp4dist.nn.clock import Clock
from fp4dist.nn.controllers import ControlledLinear, Controllers
from fp4dist.nn.exactness import Exactness
from fp4dist.nn.gather import gather_words
from fp4dist.nn.linear import Fp4Conv1D, Fp4Linear, check_dtype, convert, is_conv1d, revert
from fp4dist.nn.phases import Phases, describe, names
from fp4dist.nn.plan import FP4, HIGH, SIDE, LinearPlan, Tally, resolve_kernels
from fp4dist.nn.raising import raised
from fp4dist.nn.reasons import remarks, why_not_cuda
from fp4dist.nn.report import LinearRow, fp4_share, table_json, table_text
from fp4dist.nn.sites import Fp4Module, LinearSite, check_numbers, experts_of, find_linears, named_modules
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import BLOCK_ROLES, GEMMS, LinearRecipe, Recipe
from fp4dist.spec.run import BackendConfig
from fp4dist.spec.training import OptimizerState

if TYPE_CHECKING:
    from fp4dist.nn.optimizer import OptimizerControl


@dataclass(slots=True)
class Target:
    """A linear of this rank that runs under a plan."""

    site: LinearSite
    module: Fp4Module
    device: torch.device


@dataclass(slots=True)
class AppliedRecipe:
    """A model under a recipe: the noise clock, the table, the counters, the phases."""

    recipe: Recipe
    clock: Clock
    rows: tuple[LinearRow, ...]  # the whole model's
    remarks: tuple[str, ...]
    targets: tuple[Target, ...]  # this rank's
    backend: BackendConfig
    uncounted: int = 0  # block linears of this rank that stay torch.nn.Linear
    active: frozenset[str] = frozenset()  # names of running phases
    before: tuple[tuple[LinearRow, ...], ...] = ()  # tables that phases have replaced since the counters were reset
    data_parallel: tuple[int, int] | None = None  # (rank, size); None: torch.distributed's, for a plain model
    tokens: int | None = None  # of one micro-batch on one context-parallel rank, where known
    chunks: tuple[tuple[nn.Module, int], ...] = ()  # the model's, with the global number of their first layer
    optimizer: OptimizerControl | None = None  # what acts around the optimizer's step, once one is attached
    assigned: Assignments = field(default_factory=lambda: Assignments((), ()))  # every linear's rules, phases' too
    controllers: Controllers | None = None  # what scales and channel choices keep between steps; None: no model here
    exactness: Exactness | None = None  # what FP8 carriers lost, and which GEMMs left them; None: no model here
    entered: bool = False  # whether set_step has been called
    raised: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> GEMM -> precision above the recipe's
    phases: Phases = field(init=False)

    def __post_init__(self) -> None:
        self.phases = Phases(self.recipe)

    def table(self) -> str:
        """The table for the log, with what phases will change."""
        turned = {}
        for phase in self.recipe.phases:
            pairs = [(row.linear, row.during(self.recipe, {phase.name})[0]) for row in self.assigned.rows]
            changes = Counter((before, after) for before, after in pairs if before != after)
            turned[phase.name] = [f"{a} -> {b} ({n} linears)" for (a, b), n in changes.items()]
        return "\n".join([table_text(self.rows, self.recipe, self.remarks), *describe(self.recipe, turned)])

    def to_json(self) -> dict[str, Any]:
        """The content of layers.json."""
        return table_json(self.rows, self.recipe, self.remarks)

    def set_step(self, step: int, total: int, micro_batch: int = 0) -> list[str]:
        """Enter optimizer step `step` of `total`: moves the clock, starts phases, returns what to log.

        micro_batch   which micro-batch of the step this rank runs next: with gradient accumulation call `set_step`
                      before each, or they share their noise. Ranks of `data_parallel` never share it.
        """
        if (
            not all(isinstance(n, Integral) for n in (step, total, micro_batch))
            or min(step, total - 1, micro_batch) < 0
        ):
            raise ConfigError(
                f"set_step({step}, {total}, micro_batch={micro_batch}): needs whole numbers, step and micro_batch"
                " from 0, total from 1; count optimizer steps"
            )
        if step >= 1 and self.optimizer is None and self.recipe.steers_optimizer:
            raise RecipeMismatch(
                f"step {step}: recipe {self.recipe.name} acts around the optimizer's step, and no optimizer was given"
                " to it: call fp4dist.nn.optimizer.attach_optimizer(applied, optimizer, total_steps) before step 0"
            )
        if self.entered and step != self.clock.step:
            self.settle()
        moved = [] if self.entered else self._follow_devices()
        self.clock.step, self.entered = step, True
        if self.controllers is not None:
            self.controllers.enter(step)
        self.set_micro_batch(micro_batch)
        self.phases.enter(step, total)
        return [*moved, *self._follow_exactness(), *self._follow_phases()]

    def settle(self, lr: float | None = None) -> None:
        """End the present step: kept statistics and choices of channels take what all ranks have seen in it, quantized
        weights are forgotten, and a GEMM whose FP8 carriers have lost elements leaves them.

        A collective call of the whole world, once after each optimizer step; `set_step` makes it where nobody did.
        lr   the run's present learning rate, which `amax: learned` needs
        """
        if self.controllers is not None:
            self.controllers.settle(self.clock.step, lr)
        if self.exactness is not None:
            self.exactness.settle(self.clock.step)
        for target in self.targets:
            if target.module.plan is not None:
                target.module.plan.forget_weights()

    def lost(self) -> int:
        """Elements that FP8 carriers could not hold in the present step; of each operand the most in one carrier of any
        rank. 0 where every product was exact.

        A collective call of the whole world that waits for the device: between backward and the optimizer's step.
        """
        return sum(loss.count for loss in self.exactness.read(self.clock.step)) if self.exactness is not None else 0

    def state_dict(self) -> dict[str, Any]:
        """What a run keeps from step to step beside weights and the optimizer's tensors: CPU tensors and plain values.

        The same on every rank and for every layout. Call it between steps, after `settle`.
        """
        return {
            "controllers": self.controllers.state_dict() if self.controllers is not None else None,
            "phases": self.phases.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "exactness": self.exactness.state_dict() if self.exactness is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, after weights and optimizer have been loaded; then call `set_step`.

        Raises CheckpointError where the state is another recipe's or model's.
        """
        if self.controllers is not None and state["controllers"] is not None:
            self.controllers.load_state_dict(state["controllers"])
        self.phases.load_state_dict(state["phases"])
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.load_exactness(state)

    def load_exactness(self, state: Mapping[str, Any]) -> None:
        """Take from `state_dict`'s state only which GEMMs have left their FP8 carriers: no part of a recipe. None has
        where it says nothing.
        """
        if self.exactness is not None:
            self.exactness.load_state_dict(state.get("exactness"))
            _give_carriers(self)

    @property
    def optimizer_state(self) -> OptimizerState | None:
        """Dtypes of master weights and moments in the running phase; None where nothing is said: fp32."""
        return self.phases.optimizer_state

    def start_phase(self, name: str, reason: str = "asked for") -> list[str]:
        """Start phase `name`, which waits for a trigger, at the step of the last `set_step`; returns what to log.

        On every rank at the same step. Raises ConfigError for a phase that waits for none or runs already.
        """
        self.phases.trigger(name, reason)
        return self._follow_phases()

    @property
    def measures_noise(self) -> bool:
        """Whether a phase wants the gradient's noise measured at this step (`observe_noise`), before it trains."""
        return bool(self.phases.measuring()) and any(_rounds_backward(row) for row in self.rows)

    def observe_noise(self, ratio: float) -> list[str]:
        """Take this step's measured |g| / |g_q - g|, equal on every rank; returns what to log.

        g and g_q are the gradients, on one micro-batch, of the weights in `noisy_weights`, without and with quantized
        backward operands (`aside`).
        """
        self.phases.measured(ratio)
        return self._follow_phases()

    def noisy_weights(self) -> list[nn.Parameter]:
        """This rank's weights whose gradients have quantized operands behind them."""
        rows = {row.site.path: row for row in self.rows}
        modules = [t.module for t in self.targets if _rounds_backward(rows[t.site.path])]
        return [w for m in modules if isinstance(w := getattr(m, "weight", None), nn.Parameter)]

    @contextmanager
    def aside(self, *, high_precision_backward: bool = False) -> Iterator[None]:
        """Inside, forward and backward passes leave no trace in counters and controllers.

        high_precision_backward   no backward operand is quantized; forward passes are the same, noise included
        """
        modules = [t.module for t in self.targets]
        kept = [module.plan for module in modules]
        try:
            for module, plan in zip(modules, kept, strict=True):
                if plan is not None:
                    module.set_plan(plan.aside(high_precision_backward))
            yield
        finally:
            for module, plan in zip(modules, kept, strict=True):
                module.set_plan(plan)

    def set_micro_batch(self, micro_batch: int) -> None:
        """Enter this rank's micro-batch number `micro_batch` of the step.

        The noise is that of the global index, micro_batch * data-parallel size + data-parallel rank: ranks draw
        independently, and one process that runs all of them draws the same.
        """
        rank, size = self.data_parallel or _data_parallel(self.targets)
        self.clock.micro_batch = micro_batch * size + rank

    def counts(self) -> dict[str, Any]:
        """Counted GEMM calls and FLOPs of this rank's block linears by kind, and the share of them that ran in FP4.

        handed: slot -> operands of unrotated slots that brought their amax (replayed CUDA graphs do not count).
        gathered_bytes were received in sequence-parallel gathers, gathered_bytes_high would have been without packing.
        Linears left as torch.nn.Linear (bf16 layers of a plain model) cannot be counted; `uncounted` says how many.
        """
        calls: Counter[str] = Counter()
        flops: Counter[str] = Counter()
        for target in self._block_targets():
            tally = _tally(target)
            for (_, kind), n in tally.calls.items():
                calls[kind] += n
            for (_, kind), n in tally.flops.items():
                flops[kind] += n
        total = sum(flops.values())
        return {
            "calls": dict(calls),
            "flops": dict(flops),
            "fp4_share": flops[FP4] / total if total else 0.0,
            "uncounted": self.uncounted,
            "handed": dict(sum((_tally(target).handed for target in self._block_targets()), Counter())),
            "gathered_bytes": sum(_tally(target).gathered_bytes for target in self._block_targets()),
            "gathered_bytes_high": sum(_tally(target).gathered_bytes_high for target in self._block_targets()),
        }

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.before = ()
        for target in self.targets:
            if target.module.plan is not None:
                target.module.plan.tally = Tally()

    def check_counts(self) -> None:
        """What ran since the last reset must be what the table says: every GEMM of every target, with its kind.

        A gradient that autograd does not ask for (frozen weight, input without gradient) may be absent. Where a phase
        has started in between, the kinds of the earlier tables count as well.
        """
        tables = [{row.site.path: row.kinds() for row in rows} for rows in (self.rows, *self.before)]
        for target in self.targets:
            tally = _tally(target)
            for gemm in GEMMS:
                planned = {table[target.site.path][gemm] for table in tables}
                ran = {kind for g, kind in tally.calls if g == gemm and kind != SIDE}
                if not (ran and ran <= planned) and not (gemm in tally.unneeded and not ran):
                    raise RecipeMismatch(
                        f"{target.site.path} {gemm}: the table promises {_either(planned)}, but"
                        f" {_either(ran) or 'nothing'} ran; is the layer used, and does its gradient flow?"
                    )

    def drop_caches(self) -> None:
        """Forget quantized weights: call it when weights change outside the training loop."""
        for target in self.targets:
            if target.module.plan is not None:
                target.module.plan.drop_cache()

    def _block_targets(self) -> list[Target]:
        return [t for t in self.targets if t.site.role in BLOCK_ROLES] or list(self.targets)

    def _follow_devices(self) -> list[str]:
        """Choose kernels anew where `model.cuda()` or fully_shard has moved linears since then; returns what to log."""
        now = [(t, _device_now(t, self.chunks[0][0])) for t in self.targets]
        moved = [(target, device) for target, device in now if device != target.device]
        if not moved or self.controllers is None:
            return []
        kept, replicas = self.state_dict(), self.controllers.replicas
        told = (
            f"step {self.clock.step}: the model moved from {moved[0][0].device} to {moved[0][1]}, kernels chosen anew"
        )
        for target, device in moved:
            target.device = device
            _check_variants(
                target, self.assigned.named(target.site.path).variants(self.recipe), self.backend, self.tokens
            )
        self.controllers = _controllers(self)
        self.controllers.replicas = replicas
        self.controllers.load_state_dict(kept["controllers"])
        self.exactness = _exactness(self, self.controllers.device)
        self.exactness.load_state_dict(kept["exactness"])
        _give_plans(self)
        if self.optimizer is not None:
            self.optimizer.plans_changed()
        return [told]

    def _follow_exactness(self) -> list[str]:
        """Give GEMMs whose carriers lost elements in the step before others, and take some back; what to log."""
        if self.exactness is None:
            return []
        new = self.exactness.news()
        if new:
            _give_carriers(self)
        return [f"step {self.clock.step}: {change.text()}" for change in new]

    def _follow_phases(self) -> list[str]:
        """Make the phases that should run run; what to log of those that start."""
        running = self.phases.running()
        new = [start for start in running if start.phase not in self.active]
        left = self.active - names(running)
        if not (new or left):
            return []
        turned = {p.name for p in self.recipe.phases if p.use or p.assign}
        self.active = names(running)
        if turned & (left | names(new)):
            self._switch()
        share = f"{fp4_share(self.rows):.1%} of block-linear FLOPs in FP4"
        now = self.clock.step
        return [
            f"step {now}: phase {s.phase} {'starts' if s.step == now else f'runs since step {s.step}'} ({s.reason}),"
            f" {share}"
            for s in new
        ]

    def restore_raised(self, found: Mapping[str, Mapping[str, str]]) -> None:
        """Run GEMMs of linears in a higher precision from now on, whatever phases say. On every rank, between steps.

        found   path -> GEMM -> bf16 (unquantized) or fp8: all that is raised, as `raising.merged` makes it. Not part of
                `state_dict`: whoever decides it keeps it and gives it again after loading. Raises KernelUnavailable
                where no backend has the FP8 kernels.
        """
        if {p: dict(g) for p, g in found.items()} == self.raised:
            return
        self.raised = {path: dict(gemms) for path, gemms in found.items()}
        self._switch()

    def _switch(self) -> None:
        """Give every linear the LinearRecipe of the running phases, and of what is raised."""
        self.before = (*self.before, self.rows)
        self.rows = _rows(self.assigned, self.recipe, self.active, self.raised)
        _give_plans(self)
        if self.optimizer is not None:
            self.optimizer.plans_changed()


def apply_recipe(
    model: nn.Module | Sequence[nn.Module],
    recipe: Recipe | str | Path,
    *,
    seed: int = 0,
    backend: BackendConfig | None = None,
    sites: Sequence[LinearSite] | None = None,
    layer_offset: int | Sequence[int] = 0,
    tokens: int | None = None,
    data_parallel: tuple[int, int] | None = None,
) -> AppliedRecipe:
    """Make the linears of `model` run under `recipe`.

    model          one module, or the chunks of a pipeline stage; a torch.nn.Linear that a rule quantizes becomes an
                   Fp4Linear in place, with the same parameters, and torch.nn.Linear again under a recipe that does not
                   quantize it. DDP, FSDP2 or torch.compile may wrap the model before or after; before `fully_shard` is
                   the safer order (a linear that is a unit of its own is refused afterwards)
    sites          the whole model's linears, where `model` is one pipeline stage; default: those found in `model`
    layer_offset   global number of the first layer of each chunk
    tokens         tokens of one micro-batch on one rank, to check wgrad's contraction now rather than in the first step
    data_parallel  (rank, size) among the ranks that see different data, so that they draw different noise; default for
                   a plain model: torch.distributed's rank and world size where it is initialized, else (0, 1). Give it
                   where ranks share data (a second mesh dimension). Megatron's engines move the clock themselves
    returns        the AppliedRecipe; keep it, its `set_step` must be called before every step where noise is drawn

    Raises RecipeMismatch (a rule that matches nothing, sizes that do not divide, FP4 asked for and not got) and
    KernelUnavailable (no backend for an operand on the model's device).
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    offsets = [layer_offset] * len(chunks) if isinstance(layer_offset, int) else list(layer_offset)
    found = [(chunk, *f) for chunk, offset in zip(chunks, offsets, strict=True) for f in find_linears(chunk, offset)]
    everything = list(sites) if sites is not None else [site for _, site, _, _ in found]
    check_numbers(everything)
    assigned = assign(everything, recipe)
    backend = backend or BackendConfig()
    targets = []
    for chunk, site, _, module in found:
        variants = assigned.named(site.path).variants(recipe)
        high = all(v.is_high_precision for v in variants)
        target = _ready(module, site.path, high)
        if target is not None:
            targets.append(Target(site, target, _device(target, chunk)))
            weight = getattr(target, "weight", None)
            if weight is not None and not high:
                check_dtype(weight.dtype, f"{site.path}: its weight")
            _check_variants(targets[-1], variants, backend, tokens)
    reached = {t.site.path for t in targets}
    applied = AppliedRecipe(
        recipe=recipe,
        clock=Clock(seed=seed),
        rows=_rows(assigned, recipe),
        remarks=assigned.remarks,
        assigned=assigned,
        targets=tuple(targets),
        backend=backend,
        uncounted=sum(site.role in BLOCK_ROLES and site.path not in reached for _, site, _, _ in found),
        data_parallel=data_parallel,
        tokens=tokens,
        chunks=tuple(zip(chunks, offsets, strict=True)),
    )
    _refuse_unreachable(applied, chunks, {site.layer for _, site, _, _ in found})
    applied.controllers = _controllers(applied)
    applied.controllers.replicas = (data_parallel or _data_parallel(targets))[1]
    applied.exactness = _exactness(applied, applied.controllers.device)
    _give_plans(applied)
    applied.set_micro_batch(0)
    applied.reset_counts()  # a recipe applied earlier has left its own
    return applied


def plan_table(
    sites: Sequence[LinearSite],
    recipe: Recipe,
    *,
    tokens: int | None = None,
    tp: int = 1,
    cp: int = 1,
    sequence_parallel: bool = False,
) -> AppliedRecipe:
    """The table without a model: rules, shapes and sizes are checked, no kernel is resolved.

    tokens   of one micro-batch on one context-parallel rank;  tp, cp   tensor- and context-parallel ranks
    """
    assigned = assign(sites, recipe)
    for row in assigned.rows:
        for linear in row.variants(recipe):
            check_shapes(row.site, linear, tokens=tokens, tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    rows, remarks = _rows(assigned, recipe), assigned.remarks
    return AppliedRecipe(recipe, Clock(), rows, remarks, (), BackendConfig(), assigned=assigned)


def _rows(
    assigned: Assignments, recipe: Recipe, running: Collection[str] = (), raising: Mapping[str, dict[str, str]] = {}
) -> tuple[LinearRow, ...]:
    rows = []
    for a in assigned.rows:
        name, why = a.during(recipe, running)
        linear, above = recipe.linear(name), raising.get(a.site.path)
        if above and not linear.is_high_precision:
            linear, told = raised(linear, above), ", ".join(f"{gemm} {to}" for gemm, to in sorted(above.items()))
            why = f"{why}; raised: {told}"
        rows.append(LinearRow(a.site, name, linear, why, {}))
    return tuple(rows)


def _rounds_backward(row: LinearRow) -> bool:
    """Whether a backward GEMM of the linear has a quantized operand."""
    return any(row.kinds()[gemm] != HIGH for gemm in ("dgrad", "wgrad"))


def _check_variants(
    target: Target, variants: Sequence[LinearRecipe], backend: BackendConfig, tokens: int | None
) -> None:
    """What a phase will turn the linear into must be possible too, now rather than at the phase's first step."""
    for linear in variants:
        comm = target.module.comm
        gathers = comm.token_shard is not None
        check_shapes(
            target.site, linear, tokens=tokens, tp=comm.size, cp=comm.context[1], sequence_parallel=gathers
        )  # fmt: skip
        resolve_kernels(linear, target.device, backend)


def _device(module: Fp4Module, chunk: nn.Module) -> torch.device:
    """Where the linear computes; a head tied to the embedding has no weight of its own, the model has others."""
    weight = getattr(module, "weight", None)
    return (weight if weight is not None else next(chunk.parameters())).device


def _device_now(target: Target, chunk: nn.Module) -> torch.device:
    """Where the linear will compute; shards that wait on the CPU (offload by FSDP2 or ZeRO 3) compute elsewhere."""
    weight = getattr(target.module, "weight", None)
    waits = hasattr(weight, "placements") or hasattr(weight, "ds_id")
    device = _device(target.module, chunk)
    return target.device if waits and device.type == "cpu" else device


def _give_plans(applied: AppliedRecipe) -> None:
    """Resolve kernels and hand every target its plan; counters survive a phase switch."""
    rows = {row.site.path: i for i, row in enumerate(applied.rows)}
    updated, reasons = list(applied.rows), []
    for target in applied.targets:
        i = rows[target.site.path]
        row = updated[i]
        plan = LinearPlan.resolve(
            target.site.path, target.site.number, row.recipe, applied.clock, target.device, applied.backend,
            applied.exactness.forms(target.site.path) if applied.exactness is not None else None,
        )  # fmt: skip
        plan.device = target.device
        if target.module.plan is not None:
            plan.tally = target.module.plan.tally
        if applied.controllers is not None:
            plan.controls = applied.controllers.slots(target.site.path, row.recipe, target.module.comm)
        if applied.exactness is not None:
            path = target.site.path
            plan.carrying.count_in(applied.exactness.slots(path), applied.exactness.spreads(path))
        target.module.set_plan(plan)
        backends = {name: kernel.backend for name, kernel in plan.kernels.items()}
        gather = gather_words(row.recipe, target.module.comm, applied.tokens)
        updated[i] = LinearRow(
            row.site, row.linear, row.recipe, row.why, backends, gather, carriers=plan.carrying.words()
        )
        if target.device.type == "cuda":
            reasons.append(why_not_cuda(row.recipe, plan.kernels, target.device, applied.backend))
    applied.rows = tuple(updated)
    applied.remarks = tuple(dict.fromkeys((*applied.remarks, *remarks(reasons))))


def _give_carriers(applied: AppliedRecipe) -> None:
    """Let the plans follow `applied.exactness`: in place, for whoever holds them goes on."""
    assert applied.exactness is not None
    carriers: dict[str, dict[str, str]] = {}
    for target in applied.targets:
        plan, path = target.module.plan, target.site.path
        if plan is None or not plan.carrying.laddered:
            continue
        carrying = resolve_carrying(plan.recipe, plan.kernels, target.device, applied.exactness.forms(path))
        if carrying.types != plan.carrying.types:
            carrying.count_in(applied.exactness.slots(path), applied.exactness.spreads(path))
            plan.carrying = carrying
            plan.forget_weights()
            carriers[path] = carrying.words()
    applied.rows = tuple(
        replace(row, carriers=carriers[row.site.path]) if row.site.path in carriers else row for row in applied.rows
    )


def _exactness(applied: AppliedRecipe, device: torch.device) -> Exactness:
    """The counts of the whole model. Whether there are any is decided by the recipe, the same on every rank."""
    variants = {variant for a in applied.assigned.rows for variant in a.variants(applied.recipe)}
    watched = any(
        resolve_carrying(variant, resolve_kernels(variant, device, applied.backend), device).narrow
        for variant in variants
    )
    paths = (a.site.path for a in applied.assigned.rows)
    return Exactness(paths, device, watched, applied.backend.fp8_again_after)


def _controllers(applied: AppliedRecipe) -> Controllers:
    """What every linear of the whole model may come to keep."""
    linears = [
        ControlledLinear(a.site.path, a.site.in_features, a.variants(applied.recipe)) for a in applied.assigned.rows
    ]
    parameter = next((p for chunk, _ in applied.chunks for p in chunk.parameters()), None)
    devices = [target.device for target in applied.targets] + ([parameter.device] if parameter is not None else [])
    return Controllers(linears, devices[0] if devices else torch.device("cpu"))


def _ready(module: nn.Module, path: str, high_precision: bool) -> Fp4Module | None:
    """The module as one that can have a plan; None for one that stays, or becomes again, torch's own."""
    if high_precision and (revert(module) or not isinstance(module, Fp4Module)):
        return None
    if isinstance(module, Fp4Module):
        return module
    return convert(module, path) if isinstance(module, nn.Linear) or is_conv1d(module) else None


def _data_parallel(targets: Sequence[Target]) -> tuple[int, int]:
    """(rank, size) of this process among all, for a plain model; (0, 1) where an engine keeps the clock."""
    plain = all(isinstance(target.module, Fp4Linear | Fp4Conv1D) for target in targets)
    if not (plain and dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _refuse_unreachable(applied: AppliedRecipe, chunks: Sequence[nn.Module], local_layers: set[int | None]) -> None:
    """A linear that a rule quantizes but that nothing here can run in FP4 (such as Megatron's own output layer)."""
    reached = {t.site.path for t in applied.targets}
    held = {path for chunk in chunks for path, _, _ in named_modules(chunk)}
    shared = {experts_of(path) for path in reached} - {None}  # expert parallelism: this rank runs a part of them
    for row in applied.rows:
        site = row.site
        variants = applied.assigned.named(site.path).variants(applied.recipe)
        if site.path in reached or all(v.is_high_precision for v in variants):
            continue
        elsewhere = site.path not in held if site.layer is None else site.layer not in local_layers
        if elsewhere or experts_of(site.path) in shared:  # on another pipeline stage or expert-parallel rank
            continue
        raise RecipeMismatch(
            f"{site.path}: {row.why} asks for FP4, but this layer's class cannot run it;"
            " give it to bf16 with an earlier rule"
        )


def _either(kinds: set[str]) -> str:
    return " or ".join(sorted(kinds))


def _tally(target: Target) -> Tally:
    return target.module.plan.tally if target.module.plan is not None else Tally()
