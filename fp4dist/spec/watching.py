"""Looking at a run while it trains: what is measured how often (`monitor`), and what acts on it (`autopilot`)."""

from __future__ import annotations

from typing import Literal

from fp4dist.spec.frozen import frozen
from fp4dist.spec.recipe import GEMMS, SLOTS

Statistic = Literal["underflow", "saturation", "qsnr", "drift"]
LONGEST = 256  # steps that a condition can look back at


@frozen
class MonitorConfig:
    """What every linear's quantizers do to its operands, measured now and then on one micro-batch beside the run.

    every   steps between looks; each costs about three micro-batches, with `noise` five
    rows    of each operand that are looked at, from its first on; the tensor's amax is that of all
    noise   measure the gradient over its quantization noise too (engine.kind: megatron)
    """

    every: int = 500
    rows: int = 512
    noise: bool = True

    def __post_init__(self) -> None:
        if self.every < 3:
            raise ValueError(f"every = {self.every} must be at least 3: oscillation is seen over three steps")
        if self.rows < 128 or self.rows % 128:
            raise ValueError(f"rows = {self.rows} must be a multiple of 128, the largest block and rotation")


# ---------- when


@frozen
class Spike:
    """The step's loss or gradient norm stands out of the `window` accepted steps before it.

    above     times their spread (1.4826 x median distance from the median) over their median, and
    at_least  nats of loss, or times the median gradient norm less 1: small runs are calm
    """

    kind: Literal["spike"] = "spike"
    of: Literal["loss", "grad_norm"] = "loss"
    above: float = 8.0
    at_least: float = 0.2
    window: int = 32

    def __post_init__(self) -> None:
        if not 4 <= self.window <= LONGEST or self.above <= 0 or self.at_least < 0:
            raise ValueError(f"a spike needs 4 <= window <= {LONGEST}, above > 0 and at_least >= 0")


@frozen
class Drift:
    """The median loss of the last `window` finite steps lies `at_least` nats over the lowest such median so far."""

    kind: Literal["drift"] = "drift"
    at_least: float = 0.3
    window: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.window <= LONGEST or self.at_least <= 0:
            raise ValueError(f"a drift needs 1 <= window <= {LONGEST} and at_least > 0")


@frozen
class NotFinite:
    """Loss or gradient was not finite for `in_a_row` steps; the engine has skipped them."""

    kind: Literal["not_finite"] = "not_finite"
    in_a_row: int = 2

    def __post_init__(self) -> None:
        if self.in_a_row < 1:
            raise ValueError(f"in_a_row = {self.in_a_row} must be at least 1")


@frozen
class Drowned:
    """The monitor's last gradient-to-noise ratio lies below this; sqrt 3 by arXiv:2505.19115."""

    kind: Literal["drowned"] = "drowned"
    below: float = 1.7320508

    def __post_init__(self) -> None:
        if not self.below > 0:
            raise ValueError(f"below = {self.below} must be positive: the ratio of two lengths never is less")


@frozen
class BadOperand:
    """A statistic of the monitor's last look is beyond a bound in some layer and slot: above it, or for qsnr below."""

    kind: Literal["bad_operand"] = "bad_operand"
    of: Statistic = "underflow"
    bound: float = 0.9
    slots: tuple[str, ...] = SLOTS

    def __post_init__(self) -> None:
        if unknown := set(self.slots) - set(SLOTS):
            raise ValueError(f"slots has {sorted(unknown)}; there are {', '.join(SLOTS)}")


# ---------- what then


@frozen
class Skip:
    """Leave this step's update out. Only for a `spike`: it is known before the update."""

    kind: Literal["skip"] = "skip"


@frozen
class RollBack:
    """Go back to the last good checkpoint before the trouble and leave out the samples of `skip` x the steps since."""

    kind: Literal["roll_back"] = "roll_back"
    skip: float = 1.0

    def __post_init__(self) -> None:
        if not self.skip >= 0:
            raise ValueError(f"skip = {self.skip} must not be negative: samples are left out, none is read twice")


@frozen
class Raise:
    """Run GEMMs in a higher precision from the next step on.

    to       bf16: unquantized;  fp8: operands in MXFP8 (E4M3 values)
    where    worst: the layer that the condition names, else the one of the lowest QSNR in the monitor's last look;
             all: every block linear
    gemms    which of its GEMMs; empty: the one of the slot that was found, fprop where none was
    """

    kind: Literal["raise"] = "raise"
    to: Literal["bf16", "fp8"] = "bf16"
    where: Literal["worst", "all"] = "worst"
    gemms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.gemms) - set(GEMMS):
            raise ValueError(f"gemms has {sorted(unknown)}; there are {', '.join(GEMMS)}")


@frozen
class Rule:
    """When a condition holds, an action, at most `times` times in a run and not within `rest` steps of the last one."""

    when: Spike | Drift | NotFinite | Drowned | BadOperand
    do: Skip | RollBack | Raise
    times: int = 10
    rest: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.do, Skip) and not isinstance(self.when, Spike):
            raise ValueError("do: skip needs when: spike; nothing else is known before the update")
        if self.times < 1 or self.rest < 0:
            raise ValueError(f"times = {self.times} must be at least 1 and rest = {self.rest} not negative")


RULES = (
    Rule(when=Spike(), do=Skip(), times=20),
    Rule(when=Spike(of="grad_norm", above=20.0, at_least=10.0), do=Skip(), times=20),
    Rule(when=BadOperand(), do=Raise(), rest=1),
    Rule(when=NotFinite(), do=RollBack(), times=3),
    Rule(when=Drift(), do=RollBack(), times=3, rest=20),
)


@frozen
class AutopilotConfig:
    """What watches a run and acts.

    mode    off; advise: what a rule would do is logged; act
    rules   in this order; at each place of a step the first one that holds acts
    """

    mode: Literal["off", "advise", "act"] = "advise"
    rules: tuple[Rule, ...] = RULES


def check_rules(config: AutopilotConfig, *, checkpoints: bool, looks: bool, noise: bool, nonfinite_steps: int) -> None:
    """Raise ValueError for a rule that could never act in its run.

    checkpoints       the run writes some before its end;  looks   it has a monitor;  noise   that measures the ratio
    nonfinite_steps   in a row, at which the run stops
    """
    if config.mode == "off":
        return
    if config.mode == "act" and not checkpoints and any(isinstance(rule.do, RollBack) for rule in config.rules):
        raise ValueError("autopilot.mode = act rolls back to checkpoints, and there are none: set checkpoint.every")
    for number, rule in enumerate(config.rules):
        when, where = rule.when, f"autopilot.rules[{number}]"
        if isinstance(when, NotFinite) and when.in_a_row > nonfinite_steps:
            raise ValueError(
                f"{where}: in_a_row = {when.in_a_row}, but the run stops after train.max_nonfinite_steps ="
                f" {nonfinite_steps} such steps; lower the one or raise the other"
            )
        if isinstance(when, Drowned) and looks and not noise:
            raise ValueError(
                f"{where}: drowned asks for the gradient's noise, which nothing measures: it needs monitor.noise: true"
                " and engine.kind: megatron"
            )
        told = isinstance(when, BadOperand | Drowned)
        if isinstance(rule.do, Raise) and rule.do.where == "worst" and not (looks or told):
            raise ValueError(
                f"{where}: which layer is the worst comes from the monitor, which is off; add `monitor: {{}}`, or say"
                " `where: all`"
            )
