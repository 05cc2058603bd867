"""Every form of the kernels that the shipped recipes use is valid Triton: types and shapes of a program for an sm_90.

Triton's interpreter runs Python and does not see them; the compiler's first stage needs no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fp4dist.numerics.tensor import BlockScaledTensor, Want
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec

triton = pytest.importorskip("triton")

TYPES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
    torch.float8_e5m2: "u8", torch.float8_e4m3fn: "u8",
}  # fmt: skip


class Launches:
    """Takes the place of `launch`: the first stage of the compiler instead of a run."""

    def __init__(self) -> None:
        self.seen: set[object] = set()
        self.failed: list[str] = []

    def __call__(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], form: object
    ) -> None:
        if form in self.seen:
            return
        self.seen.add(form)
        self.compile(kernel, arguments, constants)

    def compile(self, kernel: Any, arguments: Any, constants: dict[str, Any]) -> None:
        """Note what the first stage says."""
        try:
            first_stage(kernel, arguments, constants)
        except Exception as error:
            self.failed.append(f"{kernel.__name__} {constants}: {error}")

    def of_launch(self, launch: Any, programs: int, *arguments: Any) -> None:
        """In the place of `Launch.__call__`; each is a form by itself."""
        if launch not in self.seen:
            self.seen.add(launch)
            self.compile(launch._kernel, launch.typed(arguments), launch._constants)


def first_stage(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Types of `kernel`'s program for these arguments, as the compiler infers them."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    for name, value in zip(names, arguments, strict=False):
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else _number(value)
    constexprs = {(names.index(name),): constants[name] for name in names[len(arguments) :]}
    target = GPUTarget("cuda", 90, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options({"num_warps": constants["num_warps"]})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    arguments = (options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    try:
        source.make_ir(target, *arguments)
    except TypeError:  # without a target, in older versions
        source.make_ir(*arguments)


def _number(value: float) -> str:
    return "i32" if isinstance(value, int) else "fp32"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    from fp4dist.kernels.triton import carriers, filters, power_forms, signs
    from fp4dist.kernels.triton.launch import Launch

    found = Launches()
    monkeypatch.setattr(Launch, "__call__", lambda launch, *of: found.of_launch(launch, *of))
    monkeypatch.setattr(carriers, "launch", found)
    monkeypatch.setattr(signs, "launch", found)
    monkeypatch.setattr(power_forms, "_has_asm", lambda device: True)
    monkeypatch.setattr(filters, "launch", found)
    monkeypatch.setattr(filters, "_has_asm", lambda device: True)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_every_form_of_the_quantizers_is_valid(launches: Launches) -> None:
    from fp4dist.kernels.triton.carriers import to_carrier
    from fp4dist.kernels.triton.quantizers import Side, quantize, quantize_pair, requantize
    from tests.kernels.triton import parity

    x = torch.ones((128, 256), dtype=torch.bfloat16)
    wants = Want(), Want(False, torch.bfloat16)
    for spec in parity.specs().values():
        for want in wants:
            quantize(x, spec, parity.WHOLE, want=want)
        quantize(x.t(), spec, parity.WHOLE)
        if spec.format.scale.name == "e8m0":
            spread = torch.zeros(2, dtype=torch.int32)
            q = quantize(x, spec, parity.WHOLE, want=Want(True, torch.float8_e5m2, mask=True, spread=spread))
            assert isinstance(q, BlockScaledTensor)
            quantize(x, spec, parity.WHOLE, want=Want(False, torch.bfloat16, spread=spread))
            to_carrier(q, torch.float8_e4m3fn)
        for data in parity.FORWARD[::2]:
            forward = quantize(x.t(), build(QuantSpec, data))
            assert isinstance(forward, BlockScaledTensor)
            requantize(forward, spec, parity.WHOLE)
    for row, column in parity.pairs():
        for want in wants:
            quantize_pair(x, Side(row, parity.WHOLE, None, want), Side(column, parity.WHOLE, None, want))
        if {row.format.scale.name, column.format.scale.name} == {"e8m0"}:
            want = Want(False, torch.float8_e5m2)
            quantize_pair(x, Side(row, parity.WHOLE, None, want), Side(column, parity.WHOLE, None, want))
    assert not launches.failed, "\n".join(launches.failed[:5])
    assert len(launches.seen) > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested instead")
def test_a_kernel_that_is_no_valid_program_is_found(launches: Launches) -> None:
    from fp4dist.kernels.triton.decoding import largest_byte_kernel

    launches(largest_byte_kernel, 1, (torch.ones(4, dtype=torch.uint8), 3, 4), {"B": 128, "num_warps": 4}, "wrong")
    assert len(launches.failed) == 1
