"""The verification program: it sees what differs, passes what does not, and its exit code says so.

Without a GPU the reference itself stands in for a backend, right or with one wrong bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4dist.kernels import registry
from fp4dist.kernels.registry import Kernel, Op
from fp4dist.numerics import BlockScaledTensor, quantize
from fp4dist.spec.load import shipped
from fp4dist.verify import conversions, training, wires
from fp4dist.verify.comparing import differs, on_cpu
from fp4dist.verify.parity import Matrix, of_linears, of_operands

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
OPS: tuple[Op, ...] = ("quantize", "requantize", "dequantize", "amax", "matmul", "mask", "filter_by_mask",
                       "filter_by_scales", "original")  # fmt: skip


def quiet(_: str) -> None:
    pass


def stand_in(monkeypatch: pytest.MonkeyPatch, **other: Callable[..., Any]) -> None:
    """The reference's functions as backend `cuda`, some of them replaced."""
    kernels = dict(registry._KERNELS)
    for op in OPS:
        fn = other.get(op, kernels[op, "reference"].fn)
        kernels[op, "cuda"] = Kernel(op, "cuda", fn, lambda _: None, sums=True)
    monkeypatch.setattr(registry, "_KERNELS", kernels)


def test_a_backend_with_the_references_bits_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole linears of recipes of every kind: parts, masks, rotations that are turned back, kept statistics."""
    stand_in(monkeypatch)
    names = ("nvidia_nvfp4", "quartet2", "quartet", "tetrajet_v2", "ue5m3", "wang2501", "averis")
    assert set(names) <= set(shipped("recipes"))
    matrix = of_linears(names, CPU, quiet)
    assert not matrix.faults
    ops = {cell.op for cell in matrix.cells.values()}
    assert {"quantize", "requantize", "matmul"} <= ops
    assert matrix.products > 2 * len(names)
    assert 0 < matrix.comparable <= matrix.products
    assert {cell.backend for cell in matrix.cells.values()} == {"cuda"}


def wrong_code(*args: Any, **named: Any) -> BlockScaledTensor:
    q = quantize(*args, **named)
    codes = q.codes.clone()
    codes[0, 0] ^= 1
    return dataclasses.replace(q, codes=codes)


def wrong_product(*args: Any, **named: Any) -> torch.Tensor:
    return registry._KERNELS["matmul", "reference"].fn(*args, **named) * 1.01


@pytest.mark.parametrize(("op", "fn"), [("quantize", wrong_code), ("matmul", wrong_product)])
def test_one_wrong_bit_is_a_fault(op: str, fn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, **{op: fn})
    matrix = of_linears(("nvidia_nvfp4",), CPU, quiet)
    assert {cell.op for cell in matrix.faults} == {op}
    if op == "quantize":
        assert "codes: 1 of" in (of_operands(("nvidia_nvfp4",), CPU, quiet).faults[0].fault or "")


def test_a_wrong_byte_of_a_message_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Matrix()
    wires.of_wires(matrix, CPU)
    assert len(matrix.cells) == 2 * len(wires.WIRES)
    assert not matrix.faults
    encoded, calls = wires.encode, 0

    def second_is_wrong(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        message = encoded(*args)
        message[100] ^= 0 if calls % 2 else 1  # the first is the reference's
        return message

    monkeypatch.setattr(wires, "encode", second_is_wrong)
    wires.of_wires(matrix, CPU)
    assert {cell.op for cell in matrix.faults} == {"wire_encode"}
    assert len(matrix.faults) == len(wires.WIRES)


def test_the_registry_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    before = dict(registry._KERNELS)
    with pytest.raises(ZeroDivisionError), registry.watched(lambda *_: 1 // 0):
        registry._KERNELS["amax", "cuda"](torch.ones(3))
    assert before == registry._KERNELS


def test_nans_are_equal_and_minus_zero_is_zero_but_sizes_count() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert differs(nan, on_cpu(nan)) is None
    assert differs(nan, torch.tensor([1.0, 1.0])) == "1 of 2 elements"
    assert "instead of" in (differs(nan, torch.ones(3)) or "")


def test_a_run_that_does_not_learn_fails(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"

    def judged(losses: list[float]) -> dict[str, Any]:
        metrics.write_text("\n".join(json.dumps({"loss": loss, "tokens_per_s": 10.0}) for loss in losses))
        return training.judge(metrics)

    assert judged([8.0 - 0.05 * i for i in range(training.STEPS)])["ok"]
    assert "fell by" in judged([8.0] * training.STEPS)["why"]
    assert not judged([8.0, float("nan")])["ok"]


def program(tmp_path: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-W", "ignore", "-m", "fp4dist.kernels.verify", "--out", str(tmp_path), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the small form is for machines without a GPU")
def test_the_program_in_the_interpreter(tmp_path: Path) -> None:
    done = program(tmp_path, "--small", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "verify.json").read_text())
    assert report["passed"]
    assert {cell["backend"] for cell in report["parity"]["cells"]} == {"triton"}
    assert "# fp4dist verification: passed" in (tmp_path / "verify.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be verified")
def test_nothing_to_verify_is_not_a_success(tmp_path: Path) -> None:
    done = program(tmp_path)
    assert done.returncode == 2
    assert "--small" in done.stderr
    assert program(tmp_path, "--small", "--no-train").returncode == 1


def test_the_machines_conversions_compile_for_blackwell() -> None:
    """As far as this side of Blackwell goes: ptxas takes the instructions for 10.0 and 10.3, `.rs` not for 12.0."""
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget
    pointers = {"a": "*fp32", "b": "*fp32", "x": "*fp32", "noise": "*i32", "out": "*i32", "n": "i32"}
    cases = [
        (conversions.nearest_kernel, conversions._NEAREST_ASM, 120, "cvt.rn.satfinite.e2m1x2.f32"),
        (conversions.stochastic_kernel, conversions._STOCHASTIC_ASM, 103, "cvt.rs.satfinite.e2m1x4.f32"),
    ]
    for kernel, asm, capability, instruction in cases:
        types = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
        source = compiler.ASTSource(kernel, types, {"BLOCK": 512, "ASM": asm})
        assert instruction in compiler.compile(source, target=target("cuda", capability, 32)).asm["ptx"]


def test_a_machine_without_the_instructions_says_so() -> None:
    assert set(conversions.check(CPU).values()) == {"not there: no GPU, the instruction came with 10.0"}
    x = conversions.inputs()
    assert conversions._judge(conversions.documented_nearest(x, x), conversions.documented_nearest(x, x)).startswith(
        "as"
    )
    four, noise = conversions.quadruples()
    other = conversions.documented_stochastic(four, noise.flip(0))
    assert conversions._judge(other, conversions.documented_stochastic(four, noise)).startswith("differs in")


def test_an_empty_matrix_has_no_faults() -> None:
    assert Matrix().faults == []
