"""A kernel is looked up by Triton once for each form, and run from what was found after that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fp4dist.kernels.triton import launch as module
from fp4dist.kernels.triton.launch import Launch, integer, launch, start


class Compiled:
    """Stands for what Triton gives back from a launch."""

    packed_metadata, function = "metadata", "function"

    def __init__(self, takes: int) -> None:
        self.takes, self.calls = takes, []

    def run(self, x: int, y: int, z: int, stream: int, *more: object) -> None:
        assert (stream, *more[:5]) == (7, "function", "metadata", None, None, None)
        if len(more) - 5 != self.takes:
            raise TypeError("function takes another number of arguments")
        self.calls.append(((x, y, z), more[5:]))


class Kernel:
    """Stands for a jit function of two arguments and two constants."""

    arg_names = ("x", "n", "R", "N")

    def __init__(self, takes: int = 4) -> None:
        self.compiled, self.looked_up = Compiled(takes), []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: object, **constants: object) -> Compiled:
            self.looked_up.append((grid, arguments, constants))
            return self.compiled

        return run


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMPILED", {})
    monkeypatch.setattr(module, "_stream", lambda: 7)


def test_a_form_is_looked_up_once() -> None:
    kernel, constants = Kernel(), {"N": 64, "R": 16, "num_warps": 4}
    for n in (5, 6, 7):
        launch(kernel, n, ("x", n), constants, "a form")
    launch(kernel, 8, ("x", 8), constants, "another form")
    assert [grid for grid, _, _ in kernel.looked_up] == [(5,), (8,)]
    assert kernel.compiled.calls == [((n, 1, 1), ("x", n, 16, 64)) for n in (6, 7)]  # constants in the kernel's order


def test_without_a_form_every_launch_is_looked_up() -> None:
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, 1, ("x", 1), {"R": 16, "N": 64}, None)
    assert len(kernel.looked_up) == 2
    assert not kernel.compiled.calls


def test_compiled_kernels_that_are_called_otherwise_are_looked_up() -> None:
    kernel = Kernel(takes=2)
    for _ in range(3):
        launch(kernel, 1, ("x", 1), {"R": 16, "N": 64}, "a form")
    assert len(kernel.looked_up) == 3
    assert not kernel.compiled.calls


def test_a_launch_looks_its_kernel_up_once() -> None:
    """With words where the kernel has words; what is compiled gets the same memory as it was given."""
    kernel = Kernel()
    launch = Launch(kernel, {"N": 64, "R": 16, "num_warps": 4}, (0,))
    x = torch.zeros(4, 6, dtype=torch.bfloat16)
    for n, given in ((5, x), (6, x), (7, x.t())):
        launch(n, given, n)
    ((grid, (words, _), _),) = kernel.looked_up
    assert grid == (5,)
    assert (words.dtype, words.shape, words.data_ptr()) == (torch.int32, (4, 3), x.data_ptr())
    assert [(grid[0], more[0].data_ptr(), *more[1:]) for grid, more in kernel.compiled.calls] == [
        (n, x.data_ptr(), n, 16, 64) for n in (6, 7)
    ]
    assert launch.typed((x.t(), 1))[0].shape == (4, 3)


def test_a_launch_whose_compiled_kernel_is_called_otherwise_is_looked_up() -> None:
    kernel = Kernel(takes=2)
    launch = Launch(kernel, {"R": 16, "N": 64})
    for _ in range(3):
        launch(1, "x", 1)
    assert len(kernel.looked_up) == 3
    assert not kernel.compiled.calls


@pytest.mark.parametrize(("n", "expected"), [(0, 16), (1, 1), (2, 0), (16, 16), (48, 16), (100, 0)])
def test_integers_that_triton_compiles_alike_are_one(n: int, expected: int) -> None:
    assert integer(n) == expected


def test_arguments_of_one_kind_are_compiled_alike() -> None:
    """As Triton itself sees them: types, alignment, 1 and multiples of 16, integers beyond 32 bits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime import jit

    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this version of Triton specializes elsewhere")
    specialize, backend = jit.native_specialize_impl, make_backend(GPUTarget("cuda", 90, 32))
    memory = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int16)}
    given: list[Tensor | int] = [x[i:] for x in memory.values() for i in (0, 1, 8, 16)]
    given += [sign * (n + i) for n in (0, 16, 2**31, 2**32, 2**33) for i in (-16, -1, 0, 1, 2) for sign in (1, -1)]
    compiled: dict[object, object] = {}
    for x in given:
        found = specialize(type(backend), x, False, True, True)
        assert compiled.setdefault(module._kind(x), found) == found, x
    assert len(set(compiled.values())) > 8


def test_kernels_that_are_told_little_are_looked_up_once_a_kind() -> None:
    kernel, other, constants = Kernel(), Kernel(), {"R": 16, "N": 64, "num_warps": 4}
    x = torch.zeros(64)
    for n, memory in ((5, x), (6, x), (7, x[4:]), (8, x[1:]), (2**31 + 1, x)):
        start(kernel, 1, (memory, n), constants)
    start(kernel, 1, (x, 5), {**constants, "R": 32})
    start(other, 1, (x, 5), constants)
    assert [arguments[1] for _, arguments, _ in kernel.looked_up] == [5, 8, 2**31 + 1, 5]
    assert len(kernel.compiled.calls) == 2
    assert len(other.looked_up) == 1
