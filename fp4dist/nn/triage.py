"""NaN triage: where in a model the first value that is not finite appears, forward and backward, and from what.

    with triage(model) as found:
        loss = model(batch)
        loss.backward()
    if found:
        print(found.report())

Inside the block every module is watched by hooks, and every kernel of a linear under a plan on its way in and out; a
compiled model runs uncompiled. Outside the block nothing of it is left, so a training loop pays nothing until it asks:
after a loss or a gradient norm that is not finite it runs the same micro-batches once more under `triage` (noise is
counted, not drawn, so they give the same bits), logs the report and throws the gradients away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dist.nn.clock import Clock
from fp4dist.nn.plan import LinearPlan
from fp4dist.nn.sites import global_path, named_modules
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier
from fp4dist.spec.recipe import GEMMS

Direction = Literal["forward", "backward"]
Time = tuple[int, int]  # step, micro-batch

# Slot -> the tensor of the layer that it quantizes; GEMM -> what it computes.
OPERANDS = {
    "fprop.x": "input",
    "fprop.w": "weight",
    "dgrad.dy": "grad_output",
    "dgrad.w": "weight",
    "wgrad.dy": "grad_output",
    "wgrad.x": "input",
}
RESULTS = {"fprop": "output", "dgrad": "grad_input", "wgrad": "weight gradient"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The first value of one direction that is not finite.

    path        the module, with global layer numbers; module   its class
    what        input, weight, output, grad_output, grad_input or weight gradient
    name        which one, where a module has several: a parameter's name, the modules that share an input
    nans, infs  how many of `size` values
    amax        max |value| of the module's tensors as last seen, by `what`; the culprit's own among finite values only
    slot        the slot (fprop.x) or GEMM (fprop) of a linear under a plan, and its spec; "" elsewhere
    before      the last finite value that was seen before it
    """

    direction: Direction
    path: str
    module: str
    what: str
    name: str
    nans: int
    infs: int
    size: int
    shape: tuple[int, ...]
    dtype: str
    amax: dict[str, float]
    slot: str
    spec: str
    step: int
    micro_batch: int
    rank: int
    before: str

    def text(self) -> str:
        """Four lines for a log."""
        which = f" ({self.name})" if self.name else ""
        known = ", ".join(f"{what} {value:.4g}" for what, value in self.amax.items())
        slot = f"; slot {self.slot}" + (f": {self.spec}" if self.spec else "") if self.slot else ""
        return "\n".join(
            (
                f"{self.direction}: {self.what}{which} of {self.path or 'the model'} ({self.module}) is not finite,"
                f" step {self.step}, micro-batch {self.micro_batch}, rank {self.rank}",
                f"    {self.nans} NaN and {self.infs} Inf of {self.size} values, {self.dtype} {list(self.shape)}{slot}",
                f"    amax: {known}",
                f"    last finite value before it: {self.before or 'none, it is the first that was looked at'}",
            )
        )


@dataclass(slots=True)
class Triage:
    """What `triage` has found. True if anything was not finite."""

    forward: Finding | None = None
    backward: Finding | None = None
    checked: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})  # tensors looked at

    def __bool__(self) -> bool:
        return self.forward is not None or self.backward is not None

    def report(self) -> str:
        """The findings in words; forward first, because what is wrong there explains what is wrong backward."""
        lines = []
        for direction, finding in (("forward", self.forward), ("backward", self.backward)):
            checked = f"{self.checked[direction]} tensors looked at"
            lines.append(finding.text() if finding else f"{direction}: everything finite ({checked})")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a metrics line: {"forward": {...} or None, "backward": ...}."""
        return {
            "forward": asdict(self.forward) if self.forward else None,
            "backward": asdict(self.backward) if self.backward else None,
        }


@contextmanager
def triage(
    model: nn.Module | Sequence[nn.Module],
    *,
    clock: Clock | None = None,
    layer_offset: int | Sequence[int] = 0,
) -> Generator[Triage]:
    """Watch everything that `model` computes inside the block; see the module's text for how to use it.

    model          any model under a recipe, or none, wrapped or not; or the chunks of a pipeline stage
    clock          where the run is, for the report; default: that of the first linear under a plan
    layer_offset   global number of the first layer of each chunk, as for `apply_recipe`
    yields         a Triage, filled as the block runs

    Each value looked at costs a pass over it and, on a GPU, a wait: several times a step's normal time. Hooks see what
    enters and leaves modules; a value that goes wrong between two modules (a residual sum, functional attention) is
    reported as the input of the next one, with the last finite value before it.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    offsets = [layer_offset] * len(chunks) if isinstance(layer_offset, int) else list(layer_offset)
    places = [
        (global_path(path, offset), module)
        for chunk, offset in zip(chunks, offsets, strict=True)
        for path, _, module in named_modules(chunk)
    ]
    plans = {id(plan): plan for _, module in places for plan in _plans(module)}
    watch = _Watch(clock or next((plan.clock for plan in plans.values()), Clock()))
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # a compiled module would not see new hooks
        stack.callback(watch.remove)
        for path, module in places:
            watch.module(path, module)
        for plan in plans.values():
            stack.callback(setattr, plan, "kernels", plan.kernels)
            plan.kernels = {n: replace(k, fn=partial(watch.kernel, plan, n, k.fn)) for n, k in plan.kernels.items()}
            for name in ("pair", "pair_x"):  # each of the two operands is looked at by itself
                stack.callback(setattr, plan, name, getattr(plan, name))
                setattr(plan, name, None)
        yield watch.found


class _Watch:
    """The hooks and what they have seen."""

    def __init__(self, clock: Clock) -> None:
        self.found = Triage()
        self.clock = clock
        self.rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.classes: dict[str, str] = {}
        self.specs: dict[str, Callable[[str], tuple[str, str]]] = {}  # path -> what -> (slot, spec)
        self.amax: dict[str, dict[str, float]] = {}  # path -> what -> max |value|
        self.last: dict[Direction, str] = {"forward": "", "backward": ""}
        self.gradients = WeakTensorKeyDictionary()  # tensor -> [(path, what)] of the modules it leaves and enters
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Take every hook away."""
        for handle in self.handles:
            handle.remove()

    # ---------- what is watched

    def module(self, path: str, module: nn.Module) -> None:
        """Hooks around a module's forward: after FSDP has gathered its weights, before others change its output."""
        self.classes.setdefault(path, type(module).__name__)
        plan = next(iter(_plans(module)), None)
        if plan is not None:
            self.specs[path] = partial(_slot_of, plan)
        self.handles.append(module.register_forward_pre_hook(partial(self._enter, path), with_kwargs=True))
        self.handles.append(module.register_forward_hook(partial(self._leave, path), prepend=True))

    def kernel(self, plan: LinearPlan, name: str, fn: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run the kernel of a slot or GEMM: its operand before, its result afterwards."""
        direction: Direction = "forward" if name.startswith(GEMMS[0]) else "backward"
        time = (plan.clock.step, plan.clock.micro_batch)
        slot = (name, _label(plan, name))
        self.classes.setdefault(plan.path, "linear")
        if name in OPERANDS and isinstance(args[0], Tensor):
            self._check(direction, plan.path, OPERANDS[name], args[0], time, slot=slot)
        total: Tensor | None = named.pop("into", None)  # dW is looked at alone, not with what it is added to
        result = fn(*args, **named)
        if name in OPERANDS and isinstance(result, BlockScaledTensor | Carrier):
            scale = result.scale if isinstance(result, Carrier) else result.global_scale
            self._check(direction, plan.path, OPERANDS[name], scale, time, "tensor scale", slot)
        elif name in RESULTS and isinstance(result, Tensor):
            self._check(direction, plan.path, RESULTS[name], result, time, slot=slot)
        return total.add_(result) if total is not None and isinstance(result, Tensor) else result

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in _tensors((args, kwargs)):
            self._check("forward", path, "input", tensor, self._now())
            self._follow(tensor, path, "grad_input")
        for name, parameter in module.named_parameters(recurse=False):
            self._parameter(path, name, parameter)

    def _leave(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            self._check("forward", path, "output", tensor, self._now())
            self._follow(tensor, path, "grad_output")

    def _parameter(self, path: str, name: str, parameter: nn.Parameter) -> None:
        self._check("forward", path, "weight", parameter, self._now(), "" if name == "weight" else name)
        if parameter.requires_grad and torch.is_grad_enabled() and parameter not in self.gradients:
            self.gradients[parameter] = []
            hook = partial(self._weight_gradient, path, name, parameter, self._now())
            self.handles.append(parameter.register_hook(hook))

    def _follow(self, tensor: Tensor, path: str, what: str) -> None:
        """Look at the gradient that will come back to `tensor`: once, however many modules it leaves and enters."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return
        places = self.gradients.get(tensor)
        if places is None:
            places = self.gradients[tensor] = []
            self.handles.append(tensor.register_hook(partial(self._gradient, places, self._now())))
        places.append((path, what))

    def _gradient(self, places: list[tuple[str, str]], time: Time, gradient: Tensor) -> None:
        """A gradient belongs to the modules that it comes from, those which the tensor enters; else to its maker."""
        enters = [path for path, what in places if what == "grad_input"]
        leaves = [path for path, what in places if what == "grad_output"]
        inner = [path for path in enters if not any(other.startswith(f"{path}.") or path == "" for other in enters)]
        others = f"the sum over {', '.join(inner)}" if len(inner) > 1 else ""
        path, what = ((inner or enters)[0], "grad_input") if enters else (leaves[0], "grad_output")
        self._check("backward", path, what, gradient, time, others)
        for place, kind in places:
            self.amax.setdefault(place, {})[kind] = self.amax.get(path, {}).get(what, math.nan)

    def _weight_gradient(self, path: str, name: str, parameter: nn.Parameter, time: Time, gradient: Tensor) -> None:
        which = "" if name == "weight" else name
        self._check("backward", path, "weight gradient", gradient, time, which)
        main: Tensor | None = getattr(parameter, "main_grad", None)  # Megatron's fp32 sum: the hook then gets a zero
        if main is not None:
            self._check("backward", path, "weight gradient", main, time, f"{which or 'weight'}.main_grad")

    # ---------- what is seen

    def _now(self) -> Time:
        return self.clock.step, self.clock.micro_batch

    def _check(
        self,
        direction: Direction,
        path: str,
        what: str,
        tensor: Tensor,
        time: Time,
        name: str = "",
        slot: tuple[str, str] | None = None,
    ) -> None:
        """Note a tensor's amax; keep the first that is not finite in each direction."""
        local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        local = local.detach()
        if not local.is_floating_point() or local.element_size() < 2 or local.numel() == 0 or local.is_meta:
            return
        self.found.checked[direction] += 1
        amax = local.abs().amax().item()
        known = self.amax.setdefault(path, {})
        if name != "tensor scale":
            known[what] = amax
        if math.isfinite(amax):
            self.last[direction] = f"{what}{f' ({name})' if name else ''} of {path or 'the model'}, amax {amax:.4g}"
            return
        if getattr(self.found, direction) is None:
            finding = self._finding(direction, path, what, local, time, name, slot)
            setattr(self.found, direction, finding)

    def _finding(
        self,
        direction: Direction,
        path: str,
        what: str,
        tensor: Tensor,
        time: Time,
        name: str,
        slot: tuple[str, str] | None,
    ) -> Finding:
        finite = tensor[tensor.isfinite()]
        largest = finite.abs().amax().item() if finite.numel() else math.nan
        slot = slot or self.specs.get(path, _no_slot)(what)
        return Finding(
            direction=direction,
            path=path,
            module=self.classes.get(path, ""),
            what=what,
            name=name,
            nans=int(tensor.isnan().sum()),
            infs=int(tensor.isinf().sum()),
            size=tensor.numel(),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            amax={**self.amax[path], what: largest},
            slot=slot[0],
            spec=slot[1],
            step=time[0],
            micro_batch=time[1],
            rank=self.rank,
            before=self.last[direction],
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _plans(module: nn.Module) -> list[LinearPlan]:
    """The plan of a linear, or those of a module that runs several."""
    held = [value for value in vars(module).values() if isinstance(value, LinearPlan | list | tuple | dict)]
    leaves = tree_leaves(held, is_leaf=lambda node: isinstance(node, LinearPlan))
    return [leaf for leaf in leaves if isinstance(leaf, LinearPlan)]


def _slot_of(plan: LinearPlan, what: str) -> tuple[str, str]:
    """(slot, spec) that takes a tensor of the layer, or the GEMM that makes it."""
    for names in (RESULTS, OPERANDS):
        for name, meaning in names.items():
            if meaning == what:
                return name, _label(plan, name)
    return _no_slot(what)


def _label(plan: LinearPlan, name: str) -> str:
    """A slot's spec, or how many operands of a GEMM are quantized."""
    if name not in OPERANDS:
        return plan.kind(name)
    return plan.recipe.word(name)


def _no_slot(what: str) -> tuple[str, str]:
    return "", ""
