"""What travels between ranks: a number format, how values are rounded to it, and how long a record is.

    wire: {kind: nvfp4, rounding: eden, rotation: 128}

A message is a sequence of records of `chunk` elements each; `fp4dist.comm.records` has their layout. The plain kinds
(bf16, fp32) have no records: their elements travel as they are.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from fp4dist.spec.frozen import frozen

Kind = Literal["nvfp4", "mxfp4", "fp8", "int4", "bf16", "fp32"]
HEADER = 16  # bytes of a record before its payload
SHORTEST, LONGEST = 512, 16384  # elements of a record
_PLAIN = {"bf16": 2, "fp32": 4}  # bytes of an element
_PAYLOAD_BITS = {"nvfp4": 4, "mxfp4": 4, "fp8": 8, "int4": 4}
_BLOCK = {"nvfp4": 16, "mxfp4": 32}  # elements that share a scale byte; the others have only the record's scale
_BF16_NMSE = 2.8e-6
_NMSE = {
    ("nvfp4", "nearest"): 9.0e-3, ("nvfp4", "stochastic"): 23.5e-3, ("nvfp4", "eden"): 9.28e-3,
    ("mxfp4", "nearest"): 1.40e-2, ("mxfp4", "stochastic"): 2.83e-2, ("fp8", "nearest"): 7.0e-4,
    ("fp8", "stochastic"): 1.39e-3, ("int4", "nearest"): 2.55e-2, ("int4", "stochastic"): 5.1e-2,
}  # fmt: skip


@frozen
class Wire:
    """One way to send a vector.

    kind      nvfp4: E2M1 with E4M3 scales of 16 and an fp32 scale a record; mxfp4: E2M1 with power-of-two scales of 32;
              fp8: E4M3, int4: -7 to 7, both with one fp32 scale a record; bf16, fp32: the elements themselves
    rounding  nearest; stochastic (unbiased); eden: nearest codes whose block scales make up for the rounding, unbiased
              under fresh signs, nvfp4 alone. None: eden for nvfp4, nearest for plain kinds, stochastic for the others
    rotation  size of the randomized Hadamard groups, 0 for none; signs are drawn anew for every message.
              None: 128 with eden, else 0
    signs     shared: all ranks have the same, so a sum is turned back once; per_rank: each its own, for values that
              are nearly equal on all ranks, whose errors would be, too
    chunk     elements of a record, which share the fp32 scale: a power of two
    tag       whether a record carries a hash of its bytes
    """

    SHORTHAND: ClassVar[str] = "kind"

    kind: Kind = "nvfp4"
    rounding: Literal["nearest", "stochastic", "eden"] | None = None
    rotation: Literal[0, 32, 128] | None = None
    signs: Literal["shared", "per_rank"] = "shared"
    chunk: int = 4096
    tag: bool = True

    def __post_init__(self) -> None:
        if self.rounding is None:
            usual = "eden" if self.kind == "nvfp4" else "nearest" if self.plain else "stochastic"
            object.__setattr__(self, "rounding", usual)
        if self.rotation is None:
            object.__setattr__(self, "rotation", 128 if self.rounding == "eden" else 0)
        if self.rounding == "eden" and (self.kind != "nvfp4" or not self.rotation):
            raise ValueError(
                f"rounding = eden corrects E4M3 scales in a rotated basis: it needs kind: nvfp4 and a rotation, got"
                f" kind = {self.kind}, rotation = {self.rotation}; use rounding: stochastic"
            )
        if self.plain and (self.rounding != "nearest" or self.rotation):
            raise ValueError(
                f"kind = {self.kind} sends the elements themselves: set rounding: nearest and rotation: 0, got"
                f" {self.rounding} and {self.rotation}"
            )
        if not SHORTEST <= self.chunk <= LONGEST or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk = {self.chunk} must be a power of two from {SHORTEST} to {LONGEST}")
        if self.signs == "per_rank" and not self.rotation:
            raise ValueError("signs = per_rank belongs to a rotation: set rotation: 32 or 128, or signs: shared")

    @property
    def plain(self) -> bool:
        """Whether the elements travel as they are, without records."""
        return self.kind in _PLAIN

    @property
    def draws_noise(self) -> bool:
        """Whether rounding draws random numbers."""
        return self.rounding != "nearest"

    @property
    def unbiased(self) -> bool:
        """Whether the expectation of what arrives is what was sent, of fp32 values."""
        return self.rounding != "nearest" or self.kind == "fp32"

    @property
    def block(self) -> int:
        """Elements that share a scale byte; 0: there are none."""
        return _BLOCK.get(self.kind, 0)

    def chunk_of(self, n: int) -> int:
        """Elements of each record of a message of `n`: `chunk`, or the least power of two that holds a shorter one."""
        return min(self.chunk, max(SHORTEST, 1 << max(n - 1, 0).bit_length()))

    def payload_bytes(self, elements: int) -> int:
        """Bytes of the codes of a record of `elements`."""
        return elements * _PAYLOAD_BITS[self.kind] // 8

    def scale_bytes(self, elements: int) -> int:
        """Bytes of the block scales of a record of `elements`."""
        return elements // self.block if self.block else 0

    def record_bytes(self, elements: int) -> int:
        """Bytes of a record of `elements` (`chunk_of` some length): header, payload, block scales; a multiple of 16."""
        return HEADER + self.payload_bytes(elements) + self.scale_bytes(elements)

    def bytes_of(self, n: int, chunk: int | None = None) -> int:
        """Bytes of a message of `n` elements, exactly; the last record is padded with zeros.

        chunk   elements of a record, where several messages share it; None: `chunk_of(n)`
        """
        if self.plain:
            return n * _PLAIN[self.kind]
        length = chunk or self.chunk_of(n)
        return -(-n // length) * self.record_bytes(length)

    @property
    def bytes_per_element(self) -> float:
        """Of a long message."""
        return _PLAIN[self.kind] if self.plain else self.record_bytes(self.chunk) / self.chunk

    @property
    def nmse(self) -> float:
        """Squared error of one coding of normal data, over its energy; measured once, tested against the codec."""
        if self.plain:
            return 0.0 if self.kind == "fp32" else _BF16_NMSE
        return _NMSE[self.kind, self.rounding or ""]

    def label(self) -> str:
        """A short text for tables: `nvfp4 eden rht128`."""
        words = [self.kind]
        words += {"nearest": [], "stochastic": ["sr"], "eden": ["eden"], None: []}[self.rounding]
        words += [f"rht{self.rotation}"] if self.rotation else []
        words += ["per-rank"] if self.signs == "per_rank" else []
        return " ".join(words)


NVFP4_WIRE = Wire()  # the default: unbiased, 4.53 bits an element
BF16_WIRE = Wire(kind="bf16")
FP32_WIRE = Wire(kind="fp32")
