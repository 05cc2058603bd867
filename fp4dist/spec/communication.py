"""The `comm:` section of a run: which traffic between ranks travels in which form, and how the run watches over it.

A direction that is left out, or `bf16`, travels as the engine sends it. A Wire, or the name of one (`NAMED`),
compresses it. `auto` takes the direction's own Wire (`AUTO`) where sizes and link speeds say that it pays, which needs
`topology`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from fp4dist.spec.frozen import frozen
from fp4dist.spec.wire import BF16_WIRE, FP32_WIRE, NVFP4_WIRE, Wire

Feedback = Literal["none", "ef", "loco"]
# fmt: off
Name = Literal["auto", "bf16", "fp32", "nvfp4", "nvfp4_nearest", "nvfp4_stochastic", "mxfp4", "fp8", "int4"]
# fmt: on
Choice = Wire | Name | None
Pairs = Literal["all_to_all", "all_gather"]

NAMED: dict[str, Wire] = {
    "fp32": FP32_WIRE,
    "nvfp4": NVFP4_WIRE,  # unbiased: rotated, rounded to nearest, scales corrected (MS-EDEN)
    "nvfp4_nearest": Wire(rounding="nearest", rotation=0),
    "nvfp4_stochastic": Wire(rounding="stochastic", rotation=0),
    "mxfp4": Wire(kind="mxfp4", rounding="stochastic", rotation=128),
    "fp8": Wire(kind="fp8", rounding="nearest", rotation=0),
    "int4": Wire(kind="int4", rounding="nearest", rotation=0, chunk=2048),
}
_ROTATED = Wire(rounding="nearest", rotation=128)
# What `auto` means. Gradients must be unbiased. Activations have no later sum in which noise could average out, so they
# are rounded to nearest; sums over tensor-parallel ranks stand 8 bits only.
AUTO: dict[str, Wire] = {
    "grad_reduce": NVFP4_WIRE,
    "param_gather": NAMED["nvfp4_nearest"],
    "sp_reduce_scatter": NAMED["fp8"],
    "pp_forward": _ROTATED,
    "pp_backward": NVFP4_WIRE,
    "ep_dispatch": NAMED["nvfp4_nearest"],
    "ep_combine": NAMED["fp8"],
}
DIRECTIONS = tuple(AUTO)


@frozen
class Band:
    """Where a canary's numbers may lie; outside of it the guard takes a bucket off its wire.

    nmse     |coded - exact|^2 / sum over ranks of |gradient|^2, in units of the wire's own one-shot error: 1 where the
             ranks' rounding errors are independent, the number of ranks where they are all alike
    cosine   between the coded and the exact result, at least
    bias     |<coded, exact> / <exact, exact> - 1|, at most
    """

    nmse: float = 3.0
    cosine: float = 0.95
    bias: float = 0.05

    def __post_init__(self) -> None:
        if self.nmse <= 0 or self.bias <= 0 or not -1 <= self.cosine <= 1:
            raise ValueError(
                f"nmse = {self.nmse} and bias = {self.bias} must be positive, cosine = {self.cosine} in [-1, 1]"
            )


@frozen
class Canary:
    """Every `every` steps one bucket, in turn, is reduced exactly as well and compared; 0: never."""

    every: int = 200
    band: Band = Band()

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"every = {self.every} must not be negative; 0 switches the canary off")


@frozen
class Loco:
    """e <- beta e + (1 - beta) (z - Q(z)), with z = g + e what is sent; e is forgotten every `reset` steps."""

    beta: float = 0.8
    reset: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1 or self.reset < 1:
            raise ValueError(f"beta = {self.beta} must be in [0, 1) and reset = {self.reset} at least 1")


@frozen
class CommConfig:
    """What travels how.

    grad_reduce         gradients over data-parallel ranks: reduce-scatter, or all-reduce
    param_gather        updated weights over data-parallel ranks, as codes of their change (Megatron, ZeRO 1 and 2)
    sp_reduce_scatter   partial outputs and input gradients of tensor-parallel linears under sequence parallelism (their
                        gathers carry codes already where the recipe has any)
    pp_forward          activations from stage to stage;  pp_backward   their gradients, back
    ep_dispatch         tokens to experts, and in backward the gradients of what experts gave
    ep_combine          the way back
    topology            name or path of a cluster (configs/topology): link speeds for `auto` and the printed gains
    hierarchy           ranks of each level, inner first, such as [4, 2]; auto: by topology, flat without one
    exact               how gradients beside coded ones are reduce-scattered; bf16: rounded, summed in fp32
    inner               wire of the inner level of two; sums are fp32 on both
    pairs               how two ranks exchange the halves of a reduction: all_to_all, or all_gather, for which NCCL
                        opens more connections; auto: by the topology's links, all_to_all without one
    min_numel           elements of a bucket from which on `auto` compresses it; auto: by the link's break-even
    error_feedback      of gradients: ef sends what the last message lost with the next one; loco a moving average of it
    guard               a bucket that leaves the canary's band travels in high precision from the next step on
    check               codes' headers and tags are verified on GPUs too, as on a CPU: a wait then waits for the device
                        (pipeline messages: on a CPU alone)
    sms                 multiprocessors that coding may fill on a GPU; None: all
    validate            that many first steps of a process reduce every bucket both ways, and stop when they part
    timeout_s           within which all ranks must have agreed on what travels how
    """

    grad_reduce: Choice = None
    param_gather: Choice = None
    sp_reduce_scatter: Choice = None
    pp_forward: Choice = None
    pp_backward: Choice = None
    ep_dispatch: Choice = None
    ep_combine: Choice = None
    topology: str | None = None
    hierarchy: tuple[int, ...] | Literal["auto"] = "auto"
    exact: Literal["fp32", "bf16"] = "fp32"
    inner: Wire = BF16_WIRE
    pairs: Pairs | Literal["auto"] = "auto"
    min_numel: int | Literal["auto"] = "auto"
    error_feedback: Feedback = "none"
    loco: Loco = Loco()
    canary: Canary = Canary()
    check: bool = False
    sms: int | None = None
    guard: bool = True
    validate: int = 0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        asking = [name for name in DIRECTIONS if getattr(self, name) == "auto"]
        if asking and self.topology is None:
            raise ValueError(
                f"{asking[0]}: auto weighs link speeds against the codec's time and needs `topology`, a name in"
                " configs/topology; or name a wire, such as nvfp4"
            )
        if self.error_feedback != "none" and self.wire("grad_reduce") is None:
            raise ValueError(f"error_feedback: {self.error_feedback} needs grad_reduce: it corrects what that loses")
        if self.error_feedback != "none" and self.hierarchy != "auto":
            raise ValueError(
                f"error_feedback = {self.error_feedback} with hierarchy = {list(self.hierarchy)}: a sum that is coded"
                " inside a reduction belongs to no rank's error; drop one of them"
            )
        if isinstance(self.hierarchy, tuple) and (len(self.hierarchy) < 1 or min(self.hierarchy) < 1):
            raise ValueError(f"hierarchy = {list(self.hierarchy)} must be sizes of at least 1, the inner level first")
        if self.sms is not None and self.sms < 1:
            raise ValueError(f"sms = {self.sms} must be at least 1; leave it out for all")
        if self.min_numel != "auto" and self.min_numel < 0:
            raise ValueError(f"min_numel = {self.min_numel} must not be negative")
        self._check_in_vain()
        if self.validate < 0 or self.timeout_s <= 0:
            raise ValueError(f"validate = {self.validate} must not be negative, timeout_s = {self.timeout_s} positive")

    def _check_in_vain(self) -> None:
        """What would be set without acting."""
        gradients, auto = self.wire("grad_reduce") is not None, "auto" in (self.grad_reduce, self.param_gather)
        levels = self.topology is not None or self.hierarchy != "auto"
        vain = (
            ("validate", self.validate > 0 and not gradients, "coded gradients to compare: set grad_reduce"),
            ("hierarchy", self.hierarchy != "auto" and not gradients, "coded gradients to reduce: set grad_reduce"),
            ("exact", self.exact != "fp32" and not gradients, "coded gradients beside them: set grad_reduce"),
            ("inner", self.inner != BF16_WIRE and not (gradients and levels),
             "gradients on two levels: set grad_reduce, and hierarchy or topology"),
            ("min_numel", self.min_numel != "auto" and not auto, "something to decide: set grad_reduce: auto"),
            ("loco", self.loco != Loco() and self.error_feedback != "loco", "error_feedback: loco"),
        )  # fmt: skip
        for name, wrong, need in vain:
            if wrong:
                value = getattr(self, name)
                text = list(value) if isinstance(value, tuple) else value
                raise ValueError(f"{name} = {text} would do nothing: it needs {need}; or leave it out")

    @property
    def active(self) -> tuple[str, ...]:
        """The directions that may be compressed."""
        return tuple(name for name in DIRECTIONS if self.wire(name) is not None)

    def wire(self, direction: str) -> Wire | None:
        """The Wire of a direction, names resolved; None: as the engine sends it."""
        choice = getattr(self, direction)
        if choice == "auto":
            return AUTO[direction]
        if choice is None or choice == "bf16":
            return None
        return choice if isinstance(choice, Wire) else NAMED[choice]

    def choice_is_auto(self, direction: str) -> bool:
        """Whether sizes and links decide."""
        return getattr(self, direction) == "auto"

    @property
    def exact_wire(self) -> Wire:
        """The Wire of `exact`."""
        return BF16_WIRE if self.exact == "bf16" else FP32_WIRE

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The levels of `hierarchy`, where they are given."""
        return self.hierarchy if isinstance(self.hierarchy, tuple) else None


def described(config: CommConfig) -> str:
    """The fields that are not at their defaults, in one line."""
    default = CommConfig()
    changed = [f.name for f in fields(CommConfig) if getattr(config, f.name) != getattr(default, f.name)]
    return ", ".join(f"{name} {getattr(config, name)}" for name in changed) or "everything as the engine sends it"
