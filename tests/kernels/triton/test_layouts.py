"""Threads of the main kernels keep what they load: another release of Triton may lay loads out otherwise.

A quantizer exchanges few values between threads: scales, and codes on their way to memory. `convert_layout` in Triton's
GPU program is such an exchange; counting them needs no GPU. See `fp4dist.kernels.triton.lanes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fp4dist.numerics.tensor import BlockScaledTensor, Key, Want
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec
from tests.kernels.triton.test_compiles import TYPES

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what they launch would be missing")

SIDE = 1024
KEY = Key(seed=1, layer=2)
QUEST, SHIFTED, NVFP4, EDEN = (
    build(QuantSpec, data)
    for data in (
        {"format": "mxfp4", "scale": {"kind": "quest", "power": "floor"}, "rotation": {"size": 32, "signs": "none"}},
        {"format": "mxfp4", "scale": "ceil", "rounding": "stochastic"},
        {"format": "nvfp4"},
        {"format": "nvfp4", "rounding": "eden", "rotation": {"size": 128, "signs": "fresh"}},
    )
)


def program(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """What the compiler makes of a launch for an sm_90 once it has laid everything out, as text."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    signature, fixed, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[i] if i < len(arguments) else constants[parameter.name]
        signature[parameter.name], aligned = "constexpr", isinstance(value, torch.Tensor)
        if parameter.is_constexpr:
            fixed[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if aligned and not parameter.is_constexpr:
            hints[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", 90, 32)
    backend: Any = make_backend(target)
    options = backend.parse_options({k: v for k, v in constants.items() if k not in kernel.arg_names})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=hints)
    beside: Any = (options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    try:
        module = source.make_ir(target, *beside)
    except TypeError:  # without a target, in older versions
        module = source.make_ir(*beside)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata: dict[str, Any] = {}
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    return str(module)


def exchanges(text: str) -> int:
    """Changes of layout in a program that move values between threads, and do not only call registers otherwise."""
    places = dict(re.findall(r"^(#linear\d*) = #ttg.linear<.*?(lane = .*)}>", text, re.MULTILINE))
    changes = re.findall(r"ttg.convert_layout .*: tensor<[^,]*, (.*)> -> tensor<[^,]*, (.*)> loc", text)
    assert len(changes) == text.count("ttg.convert_layout")
    return sum(places.get(before, before) != places.get(after, after) for before, after in changes)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Kernel -> exchanges in the program of its last launch; nothing is run."""
    from triton.runtime.jit import JITFunction

    found: dict[str, int] = {}

    def count(kernel: Any, *arguments: Any, grid: object, warmup: bool, **constants: Any) -> None:
        if not constants.get("AGAIN"):  # the same once more, where little is left to do
            found[kernel.__name__] = exchanges(program(kernel, arguments, constants))

    monkeypatch.setattr(JITFunction, "run", count)
    return found


def codes(spec: QuantSpec) -> BlockScaledTensor:
    bytes_ = torch.empty((SIDE, SIDE // 2), dtype=torch.uint8)
    scales = torch.empty((SIDE, SIDE // spec.shape[1]), dtype=torch.uint8)
    return BlockScaledTensor(bytes_, scales, torch.ones(()), spec.format, spec.shape, 1)


def want(carrier: torch.dtype, **more: Any) -> Want:
    """With memory of its own, so that the kernel is the one that training runs."""
    return Want(carrier=carrier, memory=torch.zeros(8, dtype=torch.int32), **more)


def power_rows(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.quantizers import quantize

    quantize(x, QUEST, KEY, want=want(torch.float8_e5m2, codes=True, mask=True))


def power_turned(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.quantizers import quantize

    quantize(x.t(), SHIFTED, KEY, want=want(torch.float8_e5m2, codes=False))


def power_codes(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.quantizers import requantize

    requantize(codes(SHIFTED), SHIFTED, KEY, want=want(torch.float8_e4m3fn, codes=False))


def e4m3_rows(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.quantizers import quantize

    quantize(x, NVFP4, KEY, want=Want(True, torch.bfloat16))


def e4m3_codes(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.quantizers import requantize

    requantize(codes(NVFP4), NVFP4, KEY, want=Want(False, torch.bfloat16))


def eden_rows(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.quantizers import quantize

    quantize(x, EDEN, KEY, want=Want(False, torch.bfloat16))


def eden_turned(x: torch.Tensor) -> None:
    eden_rows(x.t())


def filtered(x: torch.Tensor) -> None:
    from fp4dist.kernels.triton.filters import filter_by_scales

    scales = torch.empty((SIDE, SIDE // 32), dtype=torch.uint8)
    filter_by_scales(x, x, scales, torch.ones(()), QUEST, KEY)


# Exchanges under Triton 3.6.0 and 3.7.1 alike; with dimensions of a load that tie, 3.7.1 makes 3 to 10 times as many.
LIMITS: dict[Callable[[torch.Tensor], None], dict[str, int]] = {
    power_rows: {"power_kernel": 6},
    power_turned: {"power_kernel": 2},
    power_codes: {"power_kernel": 2},
    e4m3_rows: {"amax_kernel": 0, "quantize_kernel": 2},
    e4m3_codes: {"amax_kernel": 0, "quantize_kernel": 1},
    eden_rows: {"code_kernel": 3, "scale_kernel": 4},
    eden_turned: {"code_kernel": 3, "scale_kernel": 4},
    filtered: {"filter_kernel": 2},
}


@pytest.mark.parametrize("launch", LIMITS, ids=lambda launch: launch.__name__)
def test_a_thread_keeps_what_it_loads(launch: Callable[[torch.Tensor], None], counts: dict[str, int]) -> None:
    launch(torch.empty((SIDE, SIDE), dtype=torch.bfloat16))
    limits = LIMITS[launch]
    counts.pop("signs_kernel", None)
    assert counts.keys() == limits.keys()
    more = {name: f"{counts[name]}, not {limits[name]}" for name in limits if counts[name] > limits[name]}
    assert not more, (
        f"Triton {triton.__version__} exchanges values between threads more often than it needs to, which makes these "
        f"kernels several times slower: {more}. See how it lays out their loads (`tt.load` in the text of `program`) "
        "and what they ask for in fp4dist/kernels/triton/lanes.py; until that is mended, another Triton is faster."
    )
