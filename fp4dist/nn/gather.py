"""Sequence parallelism: gathering the tokens of an operand, as packed codes where its slot allows.

A rank that holds 1/n of the tokens quantizes them with the amax of all and at their place among all, so its codes are
that part of the codes of the gathered tensor; then it sends codes and scales, one buffer, 0.5625 bytes an element of
NVFP4 1x16 instead of 2. An operand that contracts I or O is a shard of rows, one that contracts T one of columns.

    slot                        packed if                                                otherwise
    bf16                                                                                 high precision
    amax_scope: shard, scales of rows or of the whole tensor, several samples, 8 bits      high precision
    a split or outlier of its own, or channels that the GEMM's other operand has chosen     high precision
    fprop.x, dgrad.dy           a rank's runs of tokens are multiples of the block's rows    high precision
    wgrad.dy, wgrad.x (master)  ... of the columns that its blocks and rotation need         high precision
    wgrad.x (requant)           ... likewise: each rank requantizes its part                 forward codes, then requant
    wgrad.x (reuse, dequant)    the forward codes are gathered, then read transposed, or their values taken
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp4dist.nn.comm import SLOT_DIMS, LinearComm, token_runs
from fp4dist.nn.parts import parted_slots
from fp4dist.nn.plan import LinearPlan, Operand, Tally
from fp4dist.numerics.tensor import BlockScaledTensor, Quantized
from fp4dist.spec.recipe import LinearRecipe, QuantSpec

Wait = Callable[[], Operand]
ROUND_SIZE = 2**20  # tokens that divide by every block and rotation


def packs(spec: QuantSpec | None, slot: str, comm: LinearComm, tokens: int) -> bool:
    """Whether this rank may quantize its own `tokens` tokens for `slot` and get the codes of the gathered tensor."""
    if spec is None or spec.amax_scope == "shard" or not spec.joins:
        return False
    multiple = spec.rows_multiple if SLOT_DIMS[slot][0] == "T" else spec.columns_multiple
    return tokens % (multiple * len(token_runs(comm, tokens, True)[0])) == 0


def gather_words(recipe: LinearRecipe, comm: LinearComm, tokens: int | None) -> dict[str, str]:
    """Slot -> packed or high, for the slots whose tokens this linear gathers. For the layer table.

    tokens   of the gathered micro-batch; None: taken to divide by every block and rotation
    """
    if comm.token_shard is None or comm.size == 1:
        return {}
    slots = ("fprop.x", "wgrad.x") if comm.token_shard == "x" else ("dgrad.dy", "wgrad.dy")
    part = tokens // comm.size if tokens is not None else ROUND_SIZE * comm.size
    parted = parted_slots(recipe)
    packed = {slot: slot not in parted and packs(recipe.slot(slot), slot, comm, part) for slot in slots}
    if comm.token_shard == "x":
        if recipe.reads_codes("wgrad.x"):
            packed["wgrad.x"] = packed["fprop.x"]  # from forward codes, which travel in either direction
            if not packed["fprop.x"]:
                del packed["wgrad.x"]  # the rank has kept the codes of all tokens
    elif not all(packed.values()):
        packed = dict.fromkeys(slots, False)  # one gather of dY serves both
    return {slot: "packed" if yes else "high" for slot, yes in packed.items()}


class TokenGather:
    """The gathers of one linear's forward or backward pass.

    counted   add their bytes to the plan's tally
    """

    def __init__(self, plan: LinearPlan, comm: LinearComm, counted: bool = True) -> None:
        self.plan, self.comm = plan, comm
        self.tally = plan.tally if counted else Tally()

    def forward_x(self, x: Tensor, needs_dw: bool) -> tuple[Wait, Operand, Operand | None]:
        """Start fprop.x of all tokens from x [..., I]; also what this rank keeps of it, and codes of wgrad.x [I, T]
        where those are made here, which then stand for x.
        """
        plan, comm = self.plan, self.comm
        if needs_dw and plan.pair_x is not None and comm.token_shard != "x":
            operand, turned = plan.quantize_input(x.flatten(0, -2), comm)
            return lambda: operand, operand, turned
        if comm.token_shard == "x" and self._packs("fprop.x", x):
            mine = plan.quantize("fprop.x", x.flatten(0, -2), comm, token_shard=True)
            assert isinstance(mine, BlockScaledTensor)
            return self.rows("fprop.x", mine, x.element_size()), mine, None
        whole = self.whole("fprop.x", x)() if comm.token_shard == "x" else x
        operand = plan.quantize("fprop.x", whole.flatten(0, -2), comm)
        return lambda: operand, operand, None

    def backward_x(self, x: Tensor | None, codes: Quantized | None, tokens: int, itemsize: int) -> Wait:
        """Start wgrad.x [I, T] from the kept input x [..., I] or its forward codes, of this rank's tokens or of all.

        tokens     all tokens that the linear sees
        itemsize   of the high-precision tensor that packed codes replace
        """
        plan, comm, slot = self.plan, self.comm, "wgrad.x"
        if comm.token_shard != "x" or comm.size == 1:
            return lambda: plan.backward_operand(slot, codes, x.flatten(0, -2) if x is not None else None, comm)
        if codes is not None and codes.shape[0] == tokens:
            return lambda: plan.backward_operand(slot, codes, None, comm)
        spec, part = plan.spec(slot), tokens // comm.size
        if packs(spec, slot, comm, part) and spec is not None and spec.source != "reuse":
            master = x.flatten(0, -2) if x is not None else None
            mine = plan.backward_operand(slot, codes, master, comm, token_shard=True)
            assert isinstance(mine, BlockScaledTensor)
            return self.columns(slot, mine, itemsize)
        if codes is not None:
            assert isinstance(codes, BlockScaledTensor)  # an operand in parts was made from all tokens
            every = self.rows(slot, codes, itemsize)
            return lambda: plan.backward_operand(slot, every(), None, comm)
        assert x is not None
        whole = self.whole(slot, x)
        return lambda: plan.backward_operand(slot, None, whole().flatten(0, -2), comm)

    def gradient(self, dy: Tensor, needs_dx: bool, needs_dw: bool) -> tuple[Wait, Wait, Callable[[], Tensor]]:
        """Start (dgrad.dy [T, O], wgrad.dy [O, T], dY [..., O] itself) of all tokens; wait only for what is needed."""
        plan, comm = self.plan, self.comm
        slots = [slot for slot, needed in (("dgrad.dy", needs_dx), ("wgrad.dy", needs_dw)) if needed]
        if comm.token_shard == "y" and slots and all(self._packs(slot, dy) for slot in slots):
            dy_TO, itemsize = dy.flatten(0, -2), dy.element_size()
            waits: dict[str, Wait] = {}
            for slot, mine in self._quantized(slots, dy_TO):
                assert isinstance(mine, BlockScaledTensor)
                gather = self.rows if slot == "dgrad.dy" else self.columns
                waits[slot] = gather(slot, mine, itemsize if slot == slots[0] else 0)  # high precision: gathered once
            return waits.get("dgrad.dy", _not_needed), waits.get("wgrad.dy", _not_needed), _not_needed
        whole = self.whole(slots[0], dy) if comm.token_shard == "y" and slots else _known(dy)
        if plan.pair is not None and len(slots) == 2:
            return *_each_once(lambda: plan.quantize_gradient(whole().flatten(0, -2), comm)), whole
        return (
            lambda: plan.quantize("dgrad.dy", whole().flatten(0, -2), comm),
            lambda: plan.quantize("wgrad.dy", whole().flatten(0, -2).t(), comm),
            whole,
        )

    def _quantized(self, slots: list[str], dy_TO: Tensor) -> Iterator[tuple[str, Operand]]:
        """This rank's part of dY as codes for each of `slots`."""
        plan, comm = self.plan, self.comm
        if plan.pair is not None and len(slots) == 2:
            yield from zip(slots, plan.quantize_gradient(dy_TO, comm, token_shard=True), strict=True)
            return
        for slot in slots:
            yield slot, plan.quantize(slot, dy_TO if slot == "dgrad.dy" else dy_TO.t(), comm, token_shard=True)

    def whole(self, slot: str, part: Tensor) -> Callable[[], Tensor]:
        """Start gathering this rank's part [n, ...] in high precision along the first dimension."""
        if self.comm.size == 1:
            return lambda: part
        self._count(slot, "high", part.numel() * part.element_size(), part.numel() * part.element_size())
        return _once(self.comm.all_gather(part.contiguous()))

    def rows(self, slot: str, mine: BlockScaledTensor, itemsize: int) -> Callable[[], BlockScaledTensor]:
        """Start gathering shards of rows; `itemsize`: of the tensor that this replaces, for the tally."""
        return self._gather(slot, mine, itemsize, columns=False)

    def columns(self, slot: str, mine: BlockScaledTensor, itemsize: int) -> Callable[[], BlockScaledTensor]:
        """Start gathering shards of columns."""
        return self._gather(slot, mine, itemsize, columns=True)

    def _gather(
        self, slot: str, mine: BlockScaledTensor, itemsize: int, *, columns: bool
    ) -> Callable[[], BlockScaledTensor]:
        if self.comm.size == 1:
            return lambda: mine
        buffer = torch.cat((mine.codes.reshape(-1), mine.scales.reshape(-1)))
        self._count(slot, "packed", buffer.numel(), mine.shape.numel() * itemsize)
        wait, split = self.comm.all_gather(buffer), mine.codes.numel()

        def finish() -> BlockScaledTensor:
            parts = wait().reshape(self.comm.size, -1)
            codes = _joined(parts[:, :split].unflatten(1, mine.codes.shape), columns)
            scales = _joined(parts[:, split:].unflatten(1, mine.scales.shape), columns)
            return replace(mine, codes=codes, scales=scales, carrier=None)

        return finish

    def _packs(self, slot: str, x: Tensor) -> bool:
        if self.comm.size == 1 or slot in self.plan.parted:
            return False
        return packs(self.plan.spec(slot), slot, self.comm, x.shape[:-1].numel())

    def _count(self, slot: str, how: str, part: int, part_high: int) -> None:
        """Bytes that this rank receives, and would receive in high precision."""
        others = self.comm.size - 1
        self.tally.add_gather(slot, how, part * others, part_high * others)


def _joined(parts: Tensor, columns: bool) -> Tensor:
    """[n, R, C] -> [n R, C], or [R, n C] where the parts are columns."""
    return (parts.transpose(0, 1) if columns else parts).reshape(
        *((parts.shape[1], -1) if columns else (-1, parts.shape[2]))
    )


def _each_once(make: Callable[[], tuple[Operand, Operand]]) -> tuple[Wait, Wait]:
    """The two results of one call of `make`, which comes with the first of them; each is given once, and let go."""
    left: dict[int, Operand] = {}

    def take(i: int) -> Operand:
        if not left:
            left.update(enumerate(make()))
        return left.pop(i)

    return lambda: take(0), lambda: take(1)


def _once(wait: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`wait`, called at most once however many operands ask for its result."""
    got: list[Tensor] = []

    def result() -> Tensor:
        if not got:
            got.append(wait())
        return got[0]

    return result


def _known(whole: Tensor) -> Callable[[], Tensor]:
    return lambda: whole


def _not_needed() -> Tensor:
    raise AssertionError("this gradient was not asked for")
