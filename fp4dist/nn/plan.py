"""A LinearPlan: everything one linear needs at run time, decided before the first step.

The hot path is function -> plan -> kernel: no rule, capability or backend is looked up inside a step. The plan counts
every GEMM it runs, so that what was promised in the layer table can be compared with what happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4dist.errors import RecipeMismatch
from fp4dist.kernels.registry import Kernel, Request, companion, resolve
from fp4dist.nn.carry import FORWARD_OF, Carrying, resolve_carrying
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import LinearComm, place
from fp4dist.nn.controllers import SlotControl
from fp4dist.nn.filling import FORWARD, token_multiple
from fp4dist.nn.parts import (
    REFERENCE,
    Ways,
    alone_beside_codes,
    channel_dim,
    chosen_later,
    cost,
    meets_straight,
    parted_slots,
    take_again,
    take_out,
    token_dim,
)
from fp4dist.nn.passing import ORIGINAL, PARTS, PRECISION, RESIDUAL, TAKEN_W, passing_kernels
from fp4dist.numerics.handed import handed
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.quantize import ReduceMax, original
from fp4dist.numerics.splits import Place, assemble, bare
from fp4dist.numerics.tensor import CODES, BlockScaledTensor, Carrier, Key, PartedTensor, Quantized, Want
from fp4dist.spec.blocks import Ema, Hadamard
from fp4dist.spec.recipe import GEMMS, SLOTS, LinearRecipe, QuantSpec
from fp4dist.spec.run import BackendConfig

FP4, FP8, MIXED, HIGH = "fp4", "fp8", "mixed", "bf16"  # both operands of 4 bits; both quantized; one; none
SIDE = "side"  # what is multiplied beside the codes
# Names in `LinearPlan.kernels`: of the backward slot that starts from forward codes as long as nothing is beside them.
FROM_CODES = {"dgrad.w": "dgrad.w:codes", "wgrad.x": "wgrad.x:codes"}
GEMM_SLOTS = {gemm: tuple(slot for slot in SLOTS if slot.startswith(gemm)) for gemm in GEMMS}


@dataclass(slots=True)
class Tally:
    """GEMM calls and FLOPs (2 T I O of this rank for each) by (gemm, kind).

    What stands beside an operand's codes is counted under kind `side`, at its true size (`fp4dist.nn.parts.cost`).
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    flops: Counter[tuple[str, str]] = field(default_factory=Counter)
    unneeded: set[str] = field(default_factory=set)  # gradients that autograd did not ask for
    handed: Counter[str] = field(default_factory=Counter)  # slot -> operands that brought their amax, unreplayed
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


class _Source(NamedTuple):
    """What a kept weight operand was made from: at which step, which memory, and how often that had been written."""

    step: int
    address: int
    version: int


class _Facts(NamedTuple):
    """What every step asks of a recipe, looked up once: a step of many small linears is bound by the host.

    specs   slot -> its spec;  multiples   slot -> (rows, columns) that its operand's must be multiples of
    kinds   GEMM -> fp4, fp8, mixed or bf16;  repeats   GEMM -> how often it runs
    dequantized, reads_codes   backward slots (see LinearRecipe);  from_codes   likewise
    later                      slots in parts that are codes alone until channels are chosen
    alone                      wgrad.x is made of the codes of fprop.x and its side (`fp4dist.nn.parts`)
    """

    specs: dict[str, QuantSpec | None]
    multiples: dict[str, tuple[int, int]]
    kinds: dict[str, str]
    repeats: dict[str, int]
    dequantized: frozenset[str]
    reads_codes: frozenset[str]
    from_codes: frozenset[str]
    later: frozenset[str]
    alone: bool

    @classmethod
    def of(cls, recipe: LinearRecipe, parted: frozenset[str]) -> _Facts:
        specs = {slot: recipe.slot(slot) for slot in SLOTS}
        return cls(
            specs,
            {slot: (spec.rows_multiple, spec.columns_multiple) for slot, spec in specs.items() if spec is not None},
            {gemm: gemm_kind(recipe, gemm) for gemm in GEMMS},
            {gemm: recipe.repeats(gemm) for gemm in GEMMS},
            frozenset(slot for slot in FORWARD_OF if recipe.dequantized(slot)),
            frozenset(slot for slot in FORWARD_OF if recipe.reads_codes(slot)),
            frozenset(slot for slot in FORWARD_OF if from_codes(slot, recipe, parted)),
            chosen_later(recipe),
            alone_beside_codes(recipe),
        )


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
    carrying    what GEMMs read in place of codes
    pair        kernel that quantizes dY for dgrad and for wgrad in one pass; None: two calls
    pair_x      likewise x for fprop and, into codes that are kept in its place, for wgrad, where that starts from x
    multiples   what the tokens of a training pass, and of a forward pass alone, have to be multiples of
    unrotates   slots whose kernel turns the forward codes back from their rotated basis itself
    device      where `apply_recipe` found the linear, for which the kernels are; None: nobody asks
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
    carrying: Carrying = field(default_factory=Carrying)
    pair: Kernel | None = None
    pair_x: Kernel | None = None
    unrotates: frozenset[str] = frozenset()
    multiples: tuple[int, int] = (1, 1)
    device: torch.device | None = None
    facts: _Facts = field(init=False)
    _weights: dict[str, tuple[_Source, Operand]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts = _Facts.of(self.recipe, self.parted)

    @classmethod
    def resolve(
        cls, path: str, number: int, recipe: LinearRecipe, clock: Clock, device: torch.device, config: BackendConfig,
        forms: Mapping[str, int] | None = None,
    ) -> LinearPlan:  # fmt: skip
        """Choose the kernels of every slot and GEMM on `device`. forms: of GEMMs' carriers, see `resolve_carrying`."""
        kernels = resolve_kernels(recipe, device, config)
        carrying, parted = resolve_carrying(recipe, kernels, device, forms), parted_slots(recipe)
        pair = resolve_pair(recipe, kernels, device, "dgrad.dy", "wgrad.dy")
        pair_x = resolve_pair(recipe, kernels, device, "fprop.x", "wgrad.x")
        unrotates = frozenset(
            slot
            for slot, kernel in kernels.items()
            if slot in SLOTS and kernel.op == "requantize" and kernel.unrotates and not from_codes(slot, recipe, parted)
        )
        return cls(
            path, number, recipe, clock, kernels, parted=parted, carrying=carrying, pair=pair, pair_x=pair_x,
            unrotates=unrotates, multiples=(token_multiple(recipe), token_multiple(recipe, FORWARD)),
        )  # fmt: skip

    def aside(self, high_precision_backward: bool) -> LinearPlan:
        """A plan of the same linear with counters of its own, which multiplies codes.

        high_precision_backward   backward GEMMs take unquantized operands; the forward one stays as it is
        """
        recipe = self.recipe.with_high_precision_backward() if high_precision_backward else self.recipe
        controls = {slot: control.muted() for slot, control in self.controls.items()}
        found = replace(
            self, recipe=recipe, tally=Tally(), controls=controls, parted=parted_slots(recipe), carrying=Carrying(),
            pair=None,
            pair_x=None,
        )  # fmt: skip
        found._weights = {slot: kept for slot, kept in self._weights.items() if not isinstance(kept[1], Carrier)}
        return found

    def spec(self, slot: str) -> QuantSpec | None:
        """The spec of a slot."""
        return self.facts.specs[slot]

    def kind(self, gemm: str) -> str:
        """fp4, mixed or bf16: how many of the GEMM's operands are quantized."""
        return self.facts.kinds[gemm]

    def multiple(self) -> int:
        """What the number of tokens has to be a multiple of in a pass that begins now."""
        training, forward = self.multiples
        return training if torch.is_grad_enabled() else forward

    def quantize(self, slot: str, x: Tensor, comm: LinearComm, token_shard: bool = False) -> Operand:
        """Quantize the matrix `x` for `slot`, or return it when the slot is bf16.

        token_shard   `x` holds this rank's part of the tokens only (sequence parallelism); it becomes codes
        """
        spec = self.spec(slot)
        if spec is None:
            return x
        return self._run(slot, spec, x, x.shape, comm, token_shard)

    def quantize_gradient(self, dy_TO: Tensor, comm: LinearComm, token_shard: bool = False) -> tuple[Operand, Operand]:
        """(dgrad.dy [T, O], wgrad.dy [O, T]) of dY, read once: the bits of two calls of `quantize`. Where `pair` is."""
        assert self.pair is not None
        wants = [CODES if token_shard else self.carrying.want(slot, True) for slot in ("dgrad.dy", "wgrad.dy")]
        return self.pair(
            dy_TO,
            self._side("dgrad.dy", dy_TO, comm, token_shard, wants[0]),
            self._side("wgrad.dy", dy_TO.t(), comm, token_shard, wants[1]),
        )

    def quantize_input(self, x_TI: Tensor, comm: LinearComm) -> tuple[Operand, Operand]:
        """(fprop.x [T, I], wgrad.x [I, T] as codes) of x, read once: what backward would make of it. Where `pair_x` is.

        The codes take 0.5625 bytes an element until backward, where x itself takes 2.
        """
        assert self.pair_x is not None
        return self.pair_x(
            x_TI,
            self._side("fprop.x", x_TI, comm, False, self.carrying.want("fprop.x", True)),
            self._side("wgrad.x", x_TI.t(), comm, False, CODES),
        )

    def quantize_weight(self, weight: Tensor, comm: LinearComm, training: bool) -> Operand:
        """The forward weight operand, kept for the rest of the step where the clock allows it.

        Only one without noise: its bits then do not depend on which micro-batch came first.
        """
        slot, spec = "fprop.w", self.spec("fprop.w")
        if self.delivered is not None:
            found = self.carrying.with_carrier(slot, self.delivered)
            assert isinstance(found, BlockScaledTensor)
            self.delivered = found
            return found
        if spec is None:
            return weight
        source = self._source(slot, spec, weight) if training else None
        if source is not None and slot in self._weights and self._weights[slot][0] == source:
            return self._weights[slot][1]
        average = self._average(spec)
        operand = self._run(slot, spec, weight, weight.shape, comm, False, **_given(toward=average))
        return self._keep(slot, source, self.carrying.with_carrier(slot, operand) if source is not None else operand)

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
        if slot != "dgrad.w" or spec is None or master is None or slot in self.controls:
            return self._backward_operand(slot, spec, forward, master, comm, token_shard)
        source = self._source(slot, spec, master)
        if source is None or not self._of_kept_weight(spec, source):
            return self._backward_operand(slot, spec, forward, master, comm, token_shard)
        if slot not in self._weights or self._weights[slot][0] != source:
            if forward is not None and "fprop.w" in self._weights and spec.source != "master":
                kept = self._weights["fprop.w"][1]  # the same codes, with their carrier
                forward = kept if isinstance(kept, BlockScaledTensor) else forward
            self._keep(slot, source, self._backward_operand(slot, spec, forward, master, comm, token_shard))
        return self._weights[slot][1]

    def _backward_operand(
        self, slot: str, spec: QuantSpec | None, forward: Quantized | None, master: Tensor | None, comm: LinearComm,
        token_shard: bool,
    ) -> Operand:  # fmt: skip
        if slot in self.facts.dequantized:
            assert forward is not None
            rotation, key = self._forward_basis(slot)
            if rotation is not None:
                return self._original(slot, forward, rotation, key).t()
            return self.kernels[slot](forward).t()
        if spec is None or spec.source == "master":
            assert master is not None
            return self.quantize(slot, master.t(), comm, token_shard)
        assert forward is not None
        if spec.source == "reuse":
            if isinstance(forward, PartedTensor) and forward.side is None:
                forward = forward.main  # a partner is for the forward product alone
            if slot in self.carrying.decoders and isinstance(forward, BlockScaledTensor) and not token_shard:
                return self.carrying.turned(slot, forward)
            return forward.transpose()
        shape = torch.Size((forward.shape[1], forward.shape[0]))
        basis = self._forward_basis(slot)
        if slot in self.facts.from_codes:
            return self._run(slot, spec, forward, shape, comm, token_shard)
        if isinstance(forward, BlockScaledTensor) and FROM_CODES[slot] in self.kernels and not self._in_parts(slot):
            return self._run(slot, spec, forward, shape, comm, token_shard)
        if slot == "wgrad.x" and isinstance(forward, PartedTensor) and self.facts.alone and self._in_parts(slot):
            return self._again(slot, spec, forward, shape, comm, token_shard)
        if slot in self.unrotates:
            return self._run(slot, spec, forward, shape, comm, token_shard, back=basis)
        return self._run(slot, spec, self._original(slot, forward, *basis).t(), shape, comm, token_shard)

    def matmul(
        self,
        gemm: str,
        a: Operand,
        b: Operand,
        counted: bool = True,
        *,
        out: torch.dtype = torch.float32,
        into: Tensor | None = None,
    ) -> Tensor:
        """A B^T, with at least one operand quantized.

        out    dtype of the result, which is rounded to it once;  into   [M, N] fp32 that it is added to, and returned
        """
        if counted:
            self.count(gemm, a.shape[0], b.shape[0], a.shape[1])
        a, b = self.operands(gemm, a, b)
        found = self.kernels[gemm](a, b, **gemm_keywords(out, into))
        return found if found.dtype == out else found.to(out)

    def operands(self, gemm: str, a: Operand, b: Operand) -> tuple[Operand, Operand]:
        """Both operands in the form that the GEMM's kernel takes."""
        first, second = GEMM_SLOTS[gemm]
        found = self.carrying.of(first, a), self.carrying.of(second, b)
        if self.training:
            self.carrying.note(first, found[0], a)
            self.carrying.note(second, found[1], b)
        return found

    def count(self, gemm: str, m: int, n: int, k: int) -> None:
        """Count a GEMM of 2 m n k FLOPs, once for each sample of an operand."""
        kind, times = self.facts.kinds[gemm], self.facts.repeats[gemm]
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
        self._weights, self.delivered = {}, None

    @property
    def cached_bytes(self) -> int:
        """Bytes that quantized weights take between micro-batches: codes, scales and carriers, each memory once."""
        held: dict[int, int] = {}
        for operand in [kept for _, kept in self._weights.values()] + [self.delivered]:
            for tensor in _memory(operand):
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
        return sum(held.values())

    def kept(self) -> list[Operand]:
        """The quantized weights that are kept for the step: whoever reads their memory later has to hold them."""
        return [operand for _, operand in self._weights.values()]

    def forget_weights(self) -> None:
        """Forget weights that were quantized for a step which is over; what was delivered stays."""
        self._weights = {}

    def _average(self, spec: QuantSpec) -> Tensor | None:
        """What the forward weight's rounding leans on; None before its time: whoever keeps the average decides."""
        return self.average if isinstance(spec.rounding, Ema) else None

    def _source(self, slot: str, spec: QuantSpec, weight: Tensor) -> _Source | None:
        """What identifies the weight as long as `slot` may keep its operand; None where it must not."""
        if not self.clock.cache_weights or not spec.is_deterministic:
            return None
        if self.delivered is not None:
            return _Source(self.clock.step, self.delivered.codes.data_ptr(), self.delivered.codes._version)
        return _Source(self.clock.step, weight.data_ptr(), weight._version)

    def _of_kept_weight(self, spec: QuantSpec, source: _Source) -> bool:
        """Whether a backward operand made from the weight of `source` is the same in every micro-batch."""
        if spec.source == "master" or self.delivered is not None:
            return True
        return "fprop.w" in self._weights and self._weights["fprop.w"][0] == source

    def _keep(self, slot: str, source: _Source | None, operand: Operand) -> Operand:
        """Keep `operand` for the rest of the step, or forget what was kept."""
        self._weights.pop(slot, None)
        if source is not None and not isinstance(operand, Tensor):
            self._weights[slot] = (source, operand)
        return operand

    def _in_parts(self, slot: str) -> bool:
        """Whether the slot's operand is more than codes now; nothing is as long as no channels are chosen."""
        if slot not in self.parted:
            return False
        control = self.controls.get("fprop.x")
        return slot not in self.facts.later or (control is not None and control.channels is not None)

    def _original(self, slot: str, forward: Quantized, rotation: Hadamard | None, key: Key) -> Tensor:
        """[R, C] fp32 values of the codes that backward `slot` starts from, in the original basis."""
        turn = self.kernels.get(ORIGINAL[slot])
        return original(forward, rotation, key) if turn is None else turn(forward, rotation, key)

    def _forward_basis(self, slot: str) -> tuple[Hadamard | None, Key]:
        """(rotation, key) of the forward codes that backward `slot` reads."""
        source = FORWARD_OF[slot]
        spec = self.spec(source)
        return spec.rotation if spec is not None else None, self.clock.key(self.number, source)

    def _run(
        self, slot: str, spec: QuantSpec, source: Operand, shape: torch.Size, comm: LinearComm, token_shard: bool,
        **named: Any,
    ) -> Operand:  # fmt: skip
        """The slot's kernel on `source`, which gives an operand of `shape`. named: what only some kernels take."""
        key, reduce_max = self._place(slot, spec, source, shape, comm, token_shard)
        if self._in_parts(slot):
            assert isinstance(source, Tensor)
            return self._parts(slot, spec, source, key, reduce_max, **named)
        want = CODES if token_shard else self.carrying.want(slot, self.training)
        return self._codes(slot, bare(spec) if spec.has_parts else spec, source, key, reduce_max, want, **named)

    def _place(
        self, slot: str, spec: QuantSpec, source: Operand, shape: torch.Size, comm: LinearComm, token_shard: bool
    ) -> tuple[Key, ReduceMax | None]:
        """(key, reduce_max) of one quantization; the slot's control sees the source. RecipeMismatch for the shape."""
        if comm.size == comm.pieces == comm.context[1] == 1:  # as `place` would, in half the time
            key = self.clock.whole_key(self.number, slot, shape[0], shape[1])
        else:
            key = place(comm, slot, shape[0], shape[1], self.clock.key(self.number, slot), token_shard)
        rows, columns = self.facts.multiples[slot]
        if shape[0] % (rows * len(key.row_runs)):
            raise self._misfit(slot, spec, "rows", shape[0], rows, len(key.row_runs))
        if shape[1] % (columns * len(key.column_runs)):
            raise self._misfit(slot, spec, "columns", shape[1], columns, len(key.column_runs))
        if spec.rotation is None and isinstance(source, Tensor) and handed(source) is not None:
            self.tally.handed[slot] += 1
        if (control := self.controls.get(slot)) is not None:
            control.recording = self.training
            if isinstance(source, Tensor):
                control.see_columns(source, comm, token_shard)
        return key, comm.reduce_max(slot, token_shard) if spec.amax_scope == "tensor" else None

    def _misfit(self, slot: str, spec: QuantSpec, name: str, size: int, multiple: int, runs: int) -> RecipeMismatch:
        several = f"are {runs} separate runs of the whole, each of which " if runs > 1 else ""
        way_out = "tokens of a micro-batch, or parallel.cp" if several else "tokens of a micro-batch"
        return RecipeMismatch(
            f"{self.path} {slot}: this rank's {size} {name} {several}must be a multiple of {multiple} for"
            f" {spec.label()}; change that size ({way_out}), or give this layer to bf16 with a rule"
        )

    def _side(self, slot: str, x: Tensor, comm: LinearComm, token_shard: bool, want: Want) -> tuple[object, ...]:
        """(spec, key, reduce_max, want): one side of a pair."""
        spec = self.facts.specs[slot]
        assert spec is not None
        key, reduce_max = self._place(slot, spec, x, x.shape, comm, token_shard)
        return spec, key, self._statistic(slot, spec, x, key, reduce_max), want

    def _statistic(
        self, slot: str, spec: QuantSpec, source: Operand, key: Key, reduce_max: ReduceMax | None
    ) -> ReduceMax | None:
        """`reduce_max`, giving the amax that the slot's control keeps."""
        control = self.controls.get(slot)
        if control is None:
            return reduce_max
        return control.through(reduce_max, source if isinstance(source, Tensor) else None, spec, key)

    def _codes(
        self, slot: str, spec: QuantSpec, source: Operand, key: Key, reduce_max: ReduceMax | None, want: Want = CODES,
        **named: Any,
    ) -> BlockScaledTensor:  # fmt: skip
        """What the slot's kernel gives, under the amax that the slot's control keeps."""
        reduce_max = self._statistic(slot, spec, source, key, reduce_max)
        if want != CODES:
            named["want"] = want
        name = FROM_CODES.get(slot, slot) if isinstance(source, BlockScaledTensor) else slot
        return self.kernels.get(name, self.kernels[slot])(source, spec, key, reduce_max, **named)

    def _parts(
        self, slot: str, spec: QuantSpec, x: Tensor, key: Key, reduce_max: ReduceMax | None, toward: object = None
    ) -> Quantized:
        """`x` [R, C] as codes and what stands beside them. toward: of ema rounding; what is taken out leaves it."""
        where = self._where(slot, key, reduce_max)
        taken = take_out(slot, x, spec, self.recipe, where, self._ways(slot))
        codes_spec = bare(spec)
        rest = taken.parts.rest
        if isinstance(toward, Tensor):
            toward = torch.where(rest == x, toward, rest)
        main = self._codes(slot, codes_spec, rest, key, reduce_max, self._beside(slot), **_given(toward=toward))
        side = taken.beside(main, codes_spec, x.dtype, where)
        straight = meets_straight(self.recipe, slot)
        return assemble(main, side, taken.partner, codes_spec, key, taken.chosen, straight)

    def _again(
        self, slot: str, spec: QuantSpec, forward: PartedTensor, shape: torch.Size, comm: LinearComm, token_shard: bool
    ) -> Quantized:
        """wgrad.x [I, T] from fprop.x, of which codes are made from codes and the side from the side."""
        key, reduce_max = self._place(slot, spec, forward.main, shape, comm, token_shard)
        main = self._codes(slot, bare(spec), forward.main, key, reduce_max, self._beside(slot))
        side, chosen = take_again(forward, spec, self._where(slot, key, reduce_max), self._ways(slot))
        straight = meets_straight(self.recipe, slot)
        return assemble(main, side, None, bare(spec), key, chosen, straight)

    def _where(self, slot: str, key: Key, reduce_max: ReduceMax | None) -> Place:
        """Where the slot's operand lies, and its chosen channels."""
        control = self.controls.get("fprop.x")
        channels = control.channels if control is not None else None
        index = control.chosen_index if control is not None else None
        return Place(key, reduce_max, token_dim(slot), self.filled, channels, channel_dim(slot), index)

    def _beside(self, slot: str) -> Want:
        """What the quantizer of an operand in parts gives: codes, and the carrier of its GEMM where that is exact."""
        want = self.carrying.want(slot, self.training)
        return want._replace(codes=True) if want.carrier == torch.bfloat16 else CODES

    def _ways(self, slot: str) -> Ways:
        """How the slot's parts are made: by kernels, where the backend has them."""
        given, plain = self.kernels.get, REFERENCE
        return Ways(
            given(PARTS[slot], plain.decompose), given(TAKEN_W, plain.take_channels),
            given(PRECISION, plain.in_precision), given(RESIDUAL, plain.hot_residual),
        )  # fmt: skip


def gemm_kind(recipe: LinearRecipe, gemm: str) -> str:
    """fp4, fp8 (both operands quantized, one or both to more than 4 bits), mixed or bf16."""
    quantized = sum(recipe.slot(s) is not None for s in SLOTS if s.startswith(gemm))
    return (HIGH, MIXED, FP4 if recipe.gemm_is_fp4(gemm) else FP8)[quantized]


def from_codes(slot: str, recipe: LinearRecipe, parted: frozenset[str]) -> bool:
    """Whether requantizing for `slot` can read the forward codes alone: nothing stands beside them, no rotation."""
    forward = recipe.slot(FORWARD_OF[slot])
    return forward is not None and forward.rotation is None and not parted & {slot, FORWARD_OF[slot]}


def _may_read_codes(slot: str, recipe: LinearRecipe) -> bool:
    """Whether requantizing for `slot` can read the forward codes as long as nothing stands beside them."""
    spec, source = recipe.slot(slot), FORWARD_OF.get(slot)
    forward = recipe.slot(source) if source is not None else None
    beside = parted_slots(recipe) & {slot, source}
    requantizes = spec is not None and spec.source == "requant" and forward is not None and forward.rotation is None
    return requantizes and bool(beside) and beside <= chosen_later(recipe)


def resolve_kernels(recipe: LinearRecipe, device: torch.device, config: BackendConfig) -> dict[str, Kernel]:
    """Slot or GEMM -> kernel, for everything that `recipe` quantizes."""
    kernels: dict[str, Kernel] = {}
    parted = parted_slots(recipe)
    for slot in SLOTS:
        spec = recipe.slot(slot)
        if recipe.dequantized(slot):
            kernels[slot] = resolve(Request("dequantize", recipe.slot(FORWARD_OF[slot]), device), config)
        if spec is not None and spec.source != "reuse":
            kernels[slot] = _quantizer(slot, spec, recipe, parted, device, config)
        if _may_read_codes(slot, recipe):
            assert spec is not None
            kernels[FROM_CODES[slot]] = resolve(Request("requantize", bare(spec), device), config)
    for gemm in GEMMS:
        if gemm_kind(recipe, gemm) != HIGH:
            spec = next(recipe.slot(s) for s in SLOTS if s.startswith(gemm) and recipe.slot(s) is not None)
            sums = any(slot.startswith(gemm) for slot in parted)
            kernels[gemm] = resolve(Request("matmul", spec, device, sums), config)
    return kernels | passing_kernels(recipe, device, config)


def resolve_pair(
    recipe: LinearRecipe, kernels: Mapping[str, Kernel], device: torch.device, row_slot: str, column_slot: str
) -> Kernel | None:
    """The kernel that writes a tensor's operand and that of its transpose at once, both made from the tensor itself;
    where the backend of both has one for their specs.
    """
    row, column = recipe.slot(row_slot), recipe.slot(column_slot)
    if row is None or column is None or {row.source, column.source} != {"master"}:
        return None
    if parted_slots(recipe) & {row_slot, column_slot} or kernels[row_slot].backend != kernels[column_slot].backend:
        return None
    return companion(Request("quantize_pair", row, device, other=column), kernels[row_slot].backend)


def gemm_keywords(out: torch.dtype, into: Any) -> dict[str, Any]:
    """Keywords of a GEMM kernel for a result of dtype `out`, or one that is added to `into`; defaults are left out."""
    if into is not None:
        return {"into": into}
    return {"out": out} if out == torch.bfloat16 else {}


def _quantizer(
    slot: str, spec: QuantSpec, recipe: LinearRecipe, parted: frozenset[str], device: torch.device,
    config: BackendConfig,
) -> Kernel:  # fmt: skip
    """The kernel that makes the slot's operand: from forward codes where it can read those, else from values."""
    if spec.source == "requant" and not parted & {slot, FORWARD_OF[slot]}:
        found = resolve(Request("requantize", bare(spec), device), config)
        if found.unrotates or from_codes(slot, recipe, parted):
            return found
    return resolve(Request("quantize", bare(spec), device), config)


def _given(**named: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in named.items() if value is not None}


def _memory(operand: Operand | None) -> list[Tensor]:
    """The tensors of an operand that is not a plain tensor."""
    if isinstance(operand, Carrier):
        return [operand.values]
    if isinstance(operand, PartedTensor):
        sides = [side for side in (operand.side, operand.partner) if side is not None]
        return [*_memory(operand.main), *sides]
    if isinstance(operand, BlockScaledTensor):
        return [operand.codes, operand.scales, *_memory(operand.carrier)]
    return []
