"""The wire codec's kernels as functions: encode records in one pass, sum records of several senders in one pass.

They obtain the bits of `fp4dist.comm.codec` on any GPU that Triton compiles for. Grids can be bounded, so that a
transfer or a GEMM beside them finds free multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dist.kernels.triton.launch import launch
from fp4dist.kernels.triton.noise import as_int32
from fp4dist.kernels.triton.wire_programs import encode_kernel, plain_kernel, recode_kernel, sum_kernel
from fp4dist.numerics.scales import fp32, target_max
from fp4dist.numerics.tensor import Key
from fp4dist.spec.blocks import E4M3_NO_CLIP, AbsMax, Eden
from fp4dist.spec.formats import E2M1, FP8_E4M3, INT4
from fp4dist.spec.wire import Wire

_KINDS = {"nvfp4": 0, "mxfp4": 1, "fp8": 2, "int4": 3}
_ROUNDINGS = {"nearest": 0, "stochastic": 1, "eden": 2}
UNIT = 8  # elements: at least 16 bytes, what a thread reads at once
PLAIN = 4096  # elements of a plain message that one program sums
_A_VECTOR = 16  # bytes
_AN_SM = 4  # programs that a multiprocessor is given under a bound
_ROTATED_RUN = 16
_PER_WARP = 1024  # elements: 32 in each thread


@dataclass(frozen=True, slots=True)
class Codec:
    """What all records of one call share.

    chunk            elements of a record
    word0            header word 0 of a record whose elements are all finite
    rounding, signs  keys of the rounding's noise and of the signs; the senders' ranks are given apart
    sms              multiprocessors that a kernel may fill; None: all
    """

    wire: Wire
    chunk: int
    word0: int
    rounding: Key
    signs: Key
    sms: int | None = None

    @property
    def run(self) -> int:
        """Elements that share a block's scale, or 16."""
        return self.wire.block or 16

    @property
    def thread_run(self) -> int:
        """Elements that a thread reads side by side: whole blocks, and as much of a rotation as its registers hold."""
        return max(_ROTATED_RUN, self.run) if self.wire.rotation else self.run

    @property
    def words(self) -> int:
        """int32 words of a record."""
        return self.wire.record_bytes(self.chunk) // 4

    @property
    def warps(self) -> int:
        """Of a program."""
        return min(max(self.chunk // max(_PER_WARP, 32 * self.thread_run), 1), 16)

    @property
    def registers(self) -> dict[str, int]:
        """A bound for encoding: more threads at once are worth more than a few instructions or spills."""
        if self.thread_run > 16 or self.wire.rounding == "stochastic":
            return {}
        return {"maxnreg": 128 if self.wire.rounding == "eden" else 64}

    def programs(self, number: int, device: torch.device) -> int:
        """Programs for `number` records."""
        if self.sms is None or device.type != "cuda":
            return number
        return min(number, max(1, self.sms * _AN_SM * 4 // self.warps))


def encode(x: Tensor, table: Tensor, records: Tensor, codec: Codec, sign_rank: int, aligned: bool) -> None:
    """Encode the records of `table` [m, 4] into records [all, bytes] uint8.

    x        the tensor that offsets count from, bf16 or fp32
    table    int64: first element in x, elements, number (for the noise), place in `records`
    aligned  x is at a multiple of 16 bytes, places and numbers of elements in the table count UNIT elements
    """
    wire, key, number = codec.wire, codec.rounding, len(table)
    if number == 0:
        return
    arguments = (
        x, table, records.view(torch.int32), number, as_int32(key.seed), as_int32(key.layer),
        as_int32(key.micro_batch), as_int32(key.step), last_word(key), as_int32(sign_rank), last_word(codec.signs),
        as_int32(codec.word0), *rule(wire), 1.0 / (wire.rotation or 1),
    )  # fmt: skip
    constants = {
        **_constants(codec, aligned), "P": _A_VECTOR // x.element_size(), "ROUND": _ROUNDINGS[wire.rounding or ""],
        "NATIVE": x.is_cuda, **codec.registers,
    }  # fmt: skip
    form = ("wire encode", x.device, x.dtype, x.data_ptr() % 16, tuple(constants.values()))
    launch(encode_kernel, codec.programs(number, x.device), arguments, constants, form)


def accumulate(
    out: Tensor, own: Tensor | None, records: Tensor, table: Tensor, codec: Codec, ranks: Tensor, factor: float,
    aligned: bool, bad: Tensor | None = None,
) -> None:  # fmt: skip
    """Out = (own + the sum over senders of their records, turned back) * factor, each rounded in fp32.

    out, own   what offsets count from, bf16 or fp32
    records    [senders, all, bytes] uint8, any stride between senders
    aligned    as in `encode`, of out and own
    table      [m, 4] int64: first element in out, elements, first element in own, place in `records`
    ranks      int32 that signs are keyed by: [senders], or [1] for all
    bad        [] int32 that becomes the least sender * all + place of a wrong record, if there is one; None: no check
    """
    key, number, (senders, every) = codec.signs, len(table), records.shape[:2]
    if number == 0:
        return
    mine = out if own is None else own
    arguments = (
        out, mine, records.view(torch.int32), table, ranks, ranks if bad is None else bad, number, every,
        records.stride(0) // 4, as_int32(key.seed), as_int32(key.layer), as_int32(key.step), last_word(key),
        as_int32(codec.word0), factor,
    )  # fmt: skip
    constants = {
        **_constants(codec, aligned), **_sources(codec, mine, senders, own is not None, bad is not None),
        "P_OUT": _A_VECTOR // out.element_size(), "NATIVE": out.is_cuda,
    }  # fmt: skip
    places = (out.data_ptr() % 16, mine.data_ptr() % 16)
    form = ("wire sum", out.device, out.dtype, mine.dtype, places, tuple(constants.values()))
    launch(sum_kernel, codec.programs(number, out.device), arguments, constants, form)


def recode(
    messages: Tensor, own: Tensor | None, records: Tensor, table: Tensor, codec: Codec, after: Codec, ranks: Tensor,
    factor: float, sign_rank: int, aligned: bool, bad: Tensor | None = None,
) -> None:  # fmt: skip
    """The records that `encode` would make of what `accumulate` would write to an fp32 vector, without that vector.

    messages   [all, bytes] uint8;  codec  as for `accumulate`
    after      of the new records: the same wire, seed, bucket and step, with other stages of noise
    table      [m, 4] int64: number of the record, elements, first element in own, place in `records` and `messages`
    sign_rank  that the new signs are keyed by
    """
    wire, key, number, (senders, every) = codec.wire, codec.signs, len(table), records.shape[:2]
    if number == 0:
        return
    mine = records if own is None else own
    arguments = (
        messages.view(torch.int32), mine, records.view(torch.int32), table, ranks, ranks if bad is None else bad,
        number, every, records.stride(0) // 4, as_int32(key.seed), as_int32(key.layer), as_int32(key.step),
        last_word(key), as_int32(codec.word0), factor, as_int32(after.rounding.micro_batch),
        last_word(after.rounding), as_int32(sign_rank), last_word(after.signs), *rule(wire),
        1.0 / (wire.rotation or 1),
    )  # fmt: skip
    constants = {
        **_constants(codec, aligned), **_sources(codec, mine, senders, own is not None, bad is not None),
        "ROUND": _ROUNDINGS[wire.rounding or ""], "NATIVE": records.is_cuda, **codec.registers,
    }  # fmt: skip
    form = ("wire recode", records.device, mine.dtype, mine.data_ptr() % 16, tuple(constants.values()))
    launch(recode_kernel, codec.programs(number, records.device), arguments, constants, form)


def _constants(codec: Codec, aligned: bool) -> dict[str, object]:
    """Of every kernel that knows records."""
    return {
        "C": codec.chunk, "E": codec.run, "RUN": codec.thread_run, "KIND": _KINDS[codec.wire.kind],
        "ROT": codec.wire.rotation or 1, "TAG": codec.wire.tag, "UNIT": UNIT if aligned else 1, "WORDS": codec.words,
        "LOG2C": codec.chunk.bit_length() - 1, "num_warps": codec.warps, "enable_fp_fusion": False,
    }  # fmt: skip


def _sources(codec: Codec, own: Tensor, senders: int, with_own: bool, check: bool) -> dict[str, object]:
    """Of the kernels that sum."""
    return {
        "P_OWN": _A_VECTOR // own.element_size(), "SOURCES": senders, "PER_RANK": codec.wire.signs == "per_rank",
        "OWN": with_own, "CHECK": check,
    }  # fmt: skip


def sum_plain(
    out: Tensor, own: Tensor | None, messages: Tensor, table: Tensor, own_at: int, factor: float, aligned: bool
) -> None:
    """Out = (the sum of the senders' elements in order, own as number `own_at` among them) * factor, in fp32.

    out, own   what offsets count from, bf16 or fp32;  messages  [senders, elements] bf16 or fp32, contiguous rows
    table      [m, 4] int64: first element in out, elements (at most PLAIN), first in own, first in a message
    aligned    as in `encode`, of all three
    """
    number, senders = len(table), len(messages)
    if number == 0:
        return
    mine = out if own is None else own
    arguments = (out, mine, messages, table, number, messages.stride(0), own_at, factor)
    constants = {
        "C": PLAIN, "P_OUT": _A_VECTOR // out.element_size(), "P_OWN": _A_VECTOR // mine.element_size(),
        "P": _A_VECTOR // messages.element_size(), "SOURCES": senders, "OWN": own is not None,
        "UNIT": UNIT if aligned else 1, "NATIVE": out.is_cuda, "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip
    places = tuple(t.data_ptr() % 16 for t in (out, mine, messages))
    form = ("plain sum", out.device, out.dtype, mine.dtype, messages.dtype, places, tuple(constants.values()))
    launch(plain_kernel, number, arguments, constants, form)


def last_word(key: Key) -> int:
    """The counter's last word: slot and stream."""
    return as_int32(key.slot + 8 * key.stream)


def rule(wire: Wire) -> tuple[float, float, float]:
    """(numerator, 1 / v, v) of the scale rule; of the formats with one scale a record v is the largest element."""
    if wire.kind in ("fp8", "int4"):
        largest = (FP8_E4M3 if wire.kind == "fp8" else INT4).max
        return 0.0, 0.0, largest
    if wire.rounding == "eden":
        return 0.0, 0.0, target_max(E2M1.max, Eden().headroom)
    v = target_max(E2M1.max, E4M3_NO_CLIP if wire.rounding == "stochastic" else 1.0)
    return fp32(fp32(AbsMax().budget) * v), fp32(1.0 / v), v
