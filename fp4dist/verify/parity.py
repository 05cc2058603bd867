"""The parity matrix: whole linears under every shipped recipe, each call of a kernel made again by the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp4dist.kernels.registry import Kernel, Op, Request, resolve, watched
from fp4dist.nn.clock import Clock
from fp4dist.nn.comm import NoComm
from fp4dist.nn.function import fp4_linear
from fp4dist.nn.plan import LinearPlan
from fp4dist.numerics import quantize, requantize
from fp4dist.numerics.blackwell_sums import matmul_in_groups
from fp4dist.numerics.quantize import original
from fp4dist.numerics.tensor import BlockScaledTensor, Carrier, Key
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import SLOTS, LinearRecipe, QuantSpec
from fp4dist.spec.run import BackendConfig
from fp4dist.verify.comparing import Replayed, differs, on_cpu

# (tokens, inputs, outputs): all divide by every shipped rotation and block; the second is ragged in larger tiles
SHAPES = ((256, 256, 384), (384, 128, 640))
SUMS = 1e-3  # relative error of a product: the FP8 tensor cores' sums of one sign are known for 4.6e-4
ROUNDED = 4e-3  # of one in bf16
_NUMBER = 0xABCD1234  # of the linear, which is half of its noise's key
_REFERENCE = BackendConfig(kind="reference")


@dataclass
class Cell:
    """One operation under one spec: how often it was compared, and the first difference."""

    recipe: str
    op: str
    spec: str
    backend: str
    calls: int = 0
    fault: str | None = None


@dataclass
class Matrix:
    """All cells; and of the GEMMs the largest error, and how many had the bits of the published FP4 accumulator."""

    cells: dict[tuple[str, ...], Cell] = field(default_factory=dict)
    products: int = 0
    as_published: int = 0
    comparable: int = 0  # products of E2M1 codes with E4M3 scales
    largest_error: float = 0.0

    def note(self, recipe: str, op: str, spec: str, backend: str, fault: str | None) -> None:
        """One comparison."""
        cell = self.cells.setdefault((op, spec, backend), Cell(recipe, op, spec, backend))
        cell.calls += 1
        cell.fault = cell.fault or fault

    @property
    def faults(self) -> list[Cell]:
        """What differs."""
        return [cell for cell in self.cells.values() if cell.fault]


def of_linears(names: Iterable[str], device: torch.device, say: Callable[[str], None]) -> Matrix:
    """Forward and backward of a linear of each kind that the recipes have, twice: the second step sees kept state."""
    matrix = Matrix()
    config = BackendConfig()
    for name in names:
        watch = _Watch(matrix, name)
        before = len(matrix.cells)
        with watched(watch):
            for recipe in load_recipe(name).linears.values():
                for shape in SHAPES:
                    _step(recipe, shape, device, config)
        say(f"{name}: {len(matrix.cells) - before} new cells, {len(matrix.faults)} faults")
    return matrix


def of_operands(names: Iterable[str], device: torch.device, say: Callable[[str], None]) -> Matrix:
    """Quantizers alone, resolved for `device` and run on CPU tensors, as Triton's interpreter can without a GPU."""
    matrix, seen = Matrix(), set[str]()
    for name in names:
        watch = _Watch(matrix, name)
        with watched(watch):
            for spec in _specs(name):
                if spec.label() in seen:
                    continue
                seen.add(spec.label())
                kernel = resolve(Request("quantize", spec, device), BackendConfig(allow_reference=True))
                kernel(_values(32, 256, 0), spec, Key(seed=7, layer=_NUMBER, step=3, micro_batch=5))
        say(f"{name}: {len(matrix.cells)} cells, {len(matrix.faults)} faults")
    return matrix


def _specs(name: str) -> Iterator[QuantSpec]:
    for linear in load_recipe(name).linears.values():
        for slot in SLOTS:
            spec = linear.slot(slot)
            if spec is not None and spec.source == "master" and not spec.has_parts:
                yield spec


def _values(rows: int, columns: int, seed: int) -> Tensor:
    """bf16 over some binades, with outliers, a row of zeros and a tie."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    x[:, 7] *= 16
    x[5] = 0
    x[1, 3] = 2.5
    return x.bfloat16()


def _step(recipe: LinearRecipe, shape: tuple[int, int, int], device: torch.device, config: BackendConfig) -> None:
    tokens, inputs, outputs = shape
    plan = LinearPlan.resolve("verify", _NUMBER, recipe, Clock(seed=7, step=3, micro_batch=5), device, config)
    x, w = (_values(n, inputs, i).to(device).requires_grad_() for i, n in enumerate((tokens, outputs)))
    fp4_linear(x, w, plan, NoComm()).backward(_values(tokens, outputs, 2).to(device))


class _Watch:
    """Runs a kernel, and the reference on copies of what it was given."""

    def __init__(self, matrix: Matrix, recipe: str) -> None:
        self.matrix, self.recipe = matrix, recipe

    def __call__(self, kernel: Kernel, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The kernel's result."""
        args = tuple(map(_remembering, args))
        given, words = on_cpu(args), {k: on_cpu(v) for k, v in named.items()}
        result = kernel.fn(*args, **named)
        if kernel.op in ("matmul", "grouped_matmul"):
            pairs = [(given, words, result)] if kernel.op == "matmul" else _each(given, words, result)
            for operands, more, product in pairs:
                self._product(kernel, operands[:2], more, product)
            return result
        fault = differs(result, _expected(kernel.op, tuple(map(_saying_again, given)), words))
        self.matrix.note(self.recipe, kernel.op, _spec_of(args), kernel.backend, fault)
        return result

    def _product(self, kernel: Kernel, operands: tuple[Any, ...], words: dict[str, Any], result: Tensor) -> None:
        wanted = _reference("matmul")(*operands, **{k: v for k, v in words.items() if k == "into"}).double()
        found = on_cpu(result).double()
        error = float((found - wanted).norm() / wanted.norm())
        limit = ROUNDED if result.dtype == torch.bfloat16 else SUMS
        fault = None if error <= limit else f"relative error {error:.1e}, at most {limit:.0e} is expected"
        matrix = self.matrix
        matrix.products += 1
        if result.dtype == torch.float32:
            matrix.largest_error = max(matrix.largest_error, error)
        if all(isinstance(o, BlockScaledTensor | Carrier) for o in operands):
            equal = _as_published(operands, words, result)
            matrix.comparable += equal is not None
            matrix.as_published += bool(equal)
        matrix.note(self.recipe, kernel.op, " x ".join(map(_form, operands)), kernel.backend, fault)


def _as_published(operands: tuple[Any, ...], words: dict[str, Any], result: Tensor) -> bool | None:
    """Whether the product has the bits of `numerics.blackwell_sums`; None where that does not define them."""
    try:
        published = matmul_in_groups(*operands, out=result.dtype) if "into" not in words else None
    except ValueError:
        return None
    return None if published is None else torch.equal(on_cpu(result), published)


def _each(given: tuple[Any, ...], words: dict[str, Any], result: Any) -> Iterator[tuple[Any, dict[str, Any], Tensor]]:
    """The pairs of a grouped GEMM; its sequences are not copied by `on_cpu`, so sums into a tensor are left out."""
    if words.get("into") is None:
        for a, b, product in zip(given[0], given[1], result, strict=True):
            yield (on_cpu(a), on_cpu(b)), {}, product


def _expected(op: Op, args: tuple[Any, ...], words: dict[str, Any]) -> Any:
    """What the reference gives for a kernel's arguments; what asks for another form of the same result is left out."""
    if op == "quantize_pair":
        x, row, column = args
        return quantize(x, *row[:3]), quantize(x.t(), *column[:3])
    if op == "to_carrier":
        return args[0].transpose() if words.get("transposed") else args[0]
    if op in ("filter_by_mask", "filter_by_scales"):
        filtered = _reference(op)(args[0].float(), *args[1:])
        return words["into"] + filtered if "into" in words else filtered.to(words.get("out") or args[0].dtype)
    if op == "original":
        dtype = words.get("dtype", args[3] if len(args) > 3 else torch.float32)
        return _reference(op)(*args[:3]).to(dtype)
    rest = {k: v for k, v in words.items() if k not in ("want", "back")}
    if op == "requantize" and words.get("back") is not None:
        return quantize(original(args[0], *words["back"]).t(), *args[1:], **rest)
    if op == "quantize" and isinstance(args[0], BlockScaledTensor):
        return requantize(*args, **rest)
    return _reference(op)(*args, **rest)


def _reference(op: Op) -> Callable[..., Any]:
    return resolve(Request(op, None, torch.device("cpu")), _REFERENCE).fn


def _remembering(value: Any) -> Any:
    """Arguments in which a reduction remembers what it said: asking a kept statistic twice would change it."""
    if isinstance(value, tuple):
        return _like(value, map(_remembering, value))
    return Replayed(value) if callable(value) else value  # type: ignore[arg-type]  # nothing else among them is callable


def _saying_again(value: Any) -> Any:
    if isinstance(value, tuple):
        return _like(value, map(_saying_again, value))
    return value.again() if isinstance(value, Replayed) else value


def _like(value: tuple[Any, ...], items: Iterable[Any]) -> tuple[Any, ...]:
    """A tuple of `items` of the kind that `value` is."""
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _spec_of(args: tuple[Any, ...]) -> str:
    """The labels of the specs among the arguments, or the form of the first operand."""
    specs = [a[0] if isinstance(a, tuple) and a else a for a in args]
    return " | ".join(s.label() for s in specs if isinstance(s, QuantSpec)) or _form(args[0])


def _form(operand: Any) -> str:
    if isinstance(operand, Carrier):
        return f"carrier {str(operand.values.dtype).removeprefix('torch.')}"
    if isinstance(operand, BlockScaledTensor):
        return f"{operand.format.title} codes"
    return str(operand.dtype).removeprefix("torch.") if isinstance(operand, Tensor) else "sum of parts"
