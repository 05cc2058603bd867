"""A LinearPlan: everything one linear needs at run time, decided before the first step.

The hot path is function -> plan -> kernel: no rule, capability or backend is looked up inside a step. The plan counts
every GEMM it runs, so that what was promised in the layer table can be compared with what happened.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fp4dist.errors import RecipeMismatch
from fp4dist.kernels.registry import Kernel, Request, resolve
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import LinearComm, place
from fp4dist.nn.controllers import SlotControl
from fp4dist.nn.parts import channel_dim, cost, parted_slots, take_out, token_dim
from fp4dist.numerics.quantize import ReduceMax, dequantize, original
from fp4dist.numerics.rotation import unrotate
from fp4dist.numerics.splits import Place, assemble, bare
from fp4dist.numerics.tensor import BlockScaledTensor, Key, PartedTensor, Quantized
from fp4dist.spec.blocks import Ema, Hadamard
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe, QuantSpec
from fp4dist.spec.run import BackendConfig

Operand = Quantized | Tensor
FORWARD_OF = {"dgrad.w": "fprop.w", "wgrad.x": "fprop.x"}  # backward operands with forward codes
FP4, FP8, MIXED, HIGH = "fp4", "fp8", "mixed", "bf16"  # both operands of 4 bits; both quantized; one; none
SIDE = "side"  # what is multiplied beside the codes


@dataclass(slots=True)
class Tally:
    """GEMM calls and FLOPs (2 T I O of this rank for each) by (gemm, kind).

    What stands beside an operand's codes is counted under kind `side`, at its true size (`fp4dist.nn.parts.cost`).
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)
    unneeded: set[str] = field(default_factory=set)  # gradients that autograd did not ask for
    gathers: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (slot, packed or high)
    gathered_bytes: int = 0  # that this rank received in sequence-parallel gathers, the amax reductions left out
    gathered_bytes_high: int = 0  # what they would have been in high precision

    def add(self, gemm: str, kind: str, flops: int, times: int = 1) -> None:
        """Count a GEMM of `flops` that runs `times` times."""
        self.calls[gemm, kind] += times
        self.flops[gemm, kind] += times * flops

    def add_gather(self, slot: str, how: str, received: int, received_high: int) -> None:
        """Count one gather of an operand over the ranks that share the tokens; both sizes in bytes."""
        self.gathers[slot, how] += 1
        self.gathered_bytes += received
        self.gathered_bytes_high += received_high


@dataclass(slots=True)
class LinearPlan:
    """One linear: its recipe, its noise key, its kernels.

    number      the linear's 32-bit number, the same on every rank and for every parallel layout
    delivered   the weight's forward codes from whoever updates the weights (fp4dist.megatron.param_gather): they stand
                for the weight until they are replaced, and the parameter itself is not read
    parted      slots whose operand is more than codes
    filled      zero tokens at the end of the present operands that only fill up a block
    controls    slot -> what it keeps from step to step, where it keeps anything
    average     [O, I] fp32 moving average of this rank's weight, which `ema` rounding leans on; None before its time
    training    whether the pass in progress is a training pass, which controls take note of; set at each pass's start
    """

    path: str
    number: int
    recipe: LinearRecipe
    clock: Clock
    kernels: dict[str, Kernel]
    tally: Tally = field(default_factory=Tally)
    delivered: BlockScaledTensor | None = None
    controls: dict[str, SlotControl] = field(default_factory=dict)
    average: Tensor | None = None
    training: bool = True
    parted: frozenset[str] = frozenset()
    filled: int = 0
    _weight: tuple[int, Quantized] | None = None

    @classmethod
    def resolve(
        cls, path: str, number: int, recipe: LinearRecipe, clock: Clock, device: torch.device, config: BackendConfig
    ) -> LinearPlan:
        """Choose the kernels of every slot and GEMM on `device`."""
        kernels = resolve_kernels(recipe, device, config)
        return cls(path, number, recipe, clock, kernels, parted=parted_slots(recipe))

    def aside(self, high_precision_backward: bool) -> LinearPlan:
        """A plan of the same linear with counters of its own.

        high_precision_backward   backward GEMMs take unquantized operands; the forward one stays as it is
        """
        recipe = self.recipe.with_high_precision_backward() if high_precision_backward else self.recipe
        controls = {slot: control.muted() for slot, control in self.controls.items()}
        return replace(self, recipe=recipe, tally=Tally(), controls=controls, parted=parted_slots(recipe))

    def spec(self, slot: str) -> QuantSpec | None:
        """The spec of a slot."""
        return self.recipe.slot(slot)

    def kind(self, gemm: str) -> str:
        """fp4, mixed or bf16: how many of the GEMM's operands are quantized."""
        return gemm_kind(self.recipe, gemm)

    def quantize(self, slot: str, x: Tensor, comm: LinearComm, token_shard: bool = False) -> Operand:
        """Quantize the matrix `x` for `slot`, or return it when the slot is bf16.

        token_shard   `x` holds this rank's part of the tokens only (sequence parallelism)
        """
        spec = self.spec(slot)
        if spec is None:
            return x
        return self._run(slot, spec, x, x.shape, comm, token_shard)

    def quantize_weight(self, weight: Tensor, comm: LinearComm, training: bool) -> Operand:
        """The forward weight operand, kept for the rest of the step where the clock allows it.

        Only one without noise: its bits then do not depend on which micro-batch came first.
        """
        if self.delivered is not None:
            return self.delivered
        spec = self.spec("fprop.w")
        cacheable = self.clock.cache_weights and training and spec is not None and spec.is_deterministic
        if cacheable and self._weight is not None and self._weight[0] == self.clock.step:
            return self._weight[1]
        operand = self._run("fprop.w", spec, weight, weight.shape, comm, False, self._average(spec)) if spec else weight
        self._weight = (self.clock.step, operand) if cacheable and not isinstance(operand, Tensor) else None
        return operand

    def backward_operand(
        self,
        slot: str,
        forward: Quantized | None,
        master: Tensor | None,
        comm: LinearComm,
        token_shard: bool = False,
    ) -> Operand:
        """The transposed weight or input for a backward GEMM, from the source that its spec names.

        forward   the codes fprop used ([O, I] or [T, I]); master   the high-precision tensor; each only where needed
        """
        spec = self.spec(slot)
        if self.recipe.dequantized(slot):
            assert forward is not None
            rotation, key = self._forward_basis(slot)
            values = dequantize(forward) if isinstance(forward, PartedTensor) else self.kernels[slot](forward)
            return (values if rotation is None else unrotate(values, rotation, key)).t()
        if spec is None or spec.source == "master":
            assert master is not None
            return self.quantize(slot, master.t(), comm, token_shard)
        assert forward is not None
        if spec.source == "reuse":
            return forward.transpose()
        shape = torch.Size((forward.shape[1], forward.shape[0]))
        rotation, key = self._forward_basis(slot)
        if from_codes(slot, self.recipe, self.parted):
            return self._run(slot, spec, forward, shape, comm, token_shard)
        return self._run(slot, spec, original(forward, rotation, key).t(), shape, comm, token_shard)

    def matmul(self, gemm: str, a: Operand, b: Operand, counted: bool = True) -> Tensor:
        """A B^T in fp32, with at least one operand quantized."""
        if counted:
            self.count(gemm, a.shape[0], b.shape[0], a.shape[1])
        return self.kernels[gemm](a, b)

    def count(self, gemm: str, m: int, n: int, k: int) -> None:
        """Count a GEMM of 2 m n k FLOPs, once for each sample of an operand."""
        kind, times = self.kind(gemm), self.recipe.repeats(gemm)
        if not self.parted:
            self.tally.add(gemm, kind, 2 * m * n * k, times)
            return
        control = self.controls.get("fprop.x")
        main, side = cost(self.recipe, gemm, m, n, k, control is not None and control.channels is not None)
        self.tally.add(gemm, kind, main, times)
        if side:
            self.tally.add(gemm, SIDE, side, times)

    def drop_cache(self) -> None:
        """Forget the quantized weight."""
        self._weight = self.delivered = None

    def _average(self, spec: QuantSpec) -> Tensor | None:
        """What the forward weight's rounding leans on; None before its time: whoever keeps the average decides."""
        return self.average if isinstance(spec.rounding, Ema) else None

    def _forward_basis(self, slot: str) -> tuple[Hadamard | None, Key]:
        """(rotation, key) of the forward codes that backward `slot` reads."""
        source = FORWARD_OF[slot]
        spec = self.spec(source)
        return spec.rotation if spec is not None else None, self.clock.key(self.number, source)

    def _run(
        self, slot: str, spec: QuantSpec, source: Operand, shape: torch.Size, comm: LinearComm, token_shard: bool,
        *more: object,
    ) -> Quantized:  # fmt: skip
        """The slot's kernel on `source`, which gives codes of `shape`.

        more   what only some specs need of it: Nones are left out
        """
        key = place(comm, slot, shape[0], shape[1], self.clock.key(self.number, slot), token_shard)
        for name, size, multiple, runs in (
            ("rows", shape[0], spec.rows_multiple, key.row_runs),
            ("columns", shape[1], spec.columns_multiple, key.column_runs),
        ):
            if size % (multiple * len(runs)):
                several = f"are {len(runs)} separate runs of the whole, each of which " if len(runs) > 1 else ""
                way_out = "tokens of a micro-batch, or parallel.cp" if several else "tokens of a micro-batch"
                raise RecipeMismatch(
                    f"{self.path} {slot}: this rank's {size} {name} {several}must be a multiple of {multiple} for"
                    f" {spec.label()}; change that size ({way_out}), or give this layer to bf16 with a rule"
                )
        reduce_max = comm.reduce_max(slot, token_shard) if spec.amax_scope == "tensor" else None
        if (control := self.controls.get(slot)) is not None:
            control.recording = self.training
            if isinstance(source, Tensor):
                control.see_columns(source, comm, token_shard)
        if slot in self.parted:
            assert isinstance(source, Tensor)
            return self._parts(slot, spec, source, key, reduce_max, *more)
        return self._codes(slot, spec, source, key, reduce_max, *more)

    def _codes(
        self, slot: str, spec: QuantSpec, source: Operand, key: Key, reduce_max: ReduceMax | None, *more: object
    ) -> BlockScaledTensor:
        """The kernel's codes, under the amax that the slot's control keeps."""
        if (control := self.controls.get(slot)) is not None:
            reduce_max = control.through(reduce_max, source if isinstance(source, Tensor) else None, spec, key)
        return self.kernels[slot](source, spec, key, reduce_max, *(given for given in more if given is not None))

    def _parts(
        self, slot: str, spec: QuantSpec, x: Tensor, key: Key, reduce_max: ReduceMax | None, toward: object = None
    ) -> Quantized:
        """`x` [R, C] as codes and what stands beside them. toward: of ema rounding; what is taken out leaves it."""
        control = self.controls.get("fprop.x")
        channels = control.channels if control is not None else None
        where = Place(key, reduce_max, token_dim(slot), self.filled, channels, channel_dim(slot))
        taken, codes_spec = take_out(slot, x, spec, self.recipe, where), bare(spec)
        rest = taken.parts.rest
        if isinstance(toward, Tensor):
            toward = torch.where(rest == x, toward, rest)
        main = self._codes(slot, codes_spec, rest, key, reduce_max, toward)
        return assemble(main, taken.beside(main, codes_spec, x.dtype, where), taken.partner, codes_spec, key)


def gemm_kind(recipe: LinearRecipe, gemm: str) -> str:
    """fp4, fp8 (both operands quantized, one or both to more than 4 bits), mixed or bf16."""
    quantized = sum(recipe.slot(s) is not None for s in SLOTS if s.startswith(gemm))
    return (HIGH, MIXED, FP4 if recipe.gemm_is_fp4(gemm) else FP8)[quantized]


def from_codes(slot: str, recipe: LinearRecipe, parted: frozenset[str]) -> bool:
    """Whether requantizing for `slot` can read the forward codes alone: nothing stands beside them, no rotation."""
    forward = recipe.slot(FORWARD_OF[slot])
    return forward is not None and forward.rotation is None and not parted & {slot, FORWARD_OF[slot]}


def resolve_kernels(recipe: LinearRecipe, device: torch.device, config: BackendConfig) -> dict[str, Kernel]:
    """Slot or GEMM -> kernel, for everything that `recipe` quantizes."""
    kernels: dict[str, Kernel] = {}
    parted = parted_slots(recipe)
    for slot in SLOTS:
        spec = recipe.slot(slot)
        if recipe.dequantized(slot):
            kernels[slot] = resolve(Request("dequantize", recipe.slot(FORWARD_OF[slot]), device), config)
        if spec is not None and spec.source != "reuse":
            op = "requantize" if spec.source == "requant" and from_codes(slot, recipe, parted) else "quantize"
            kernels[slot] = resolve(Request(op, bare(spec), device), config)
    for gemm in GEMMS:
        if gemm_kind(recipe, gemm) != HIGH:
            spec = next(recipe.slot(s) for s in SLOTS if s.startswith(gemm) and recipe.slot(s) is not None)
            sums = any(slot.startswith(gemm) for slot in parted)
            kernels[gemm] = resolve(Request("matmul", spec, device, sums), config)
    return kernels
