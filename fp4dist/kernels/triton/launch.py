# pyright: reportCallIssue=false
# (a launch takes options beside the kernel's own parameters)
"""Launching a kernel again without Triton's search for what was compiled, which takes longer than many kernels run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

# form -> (launcher, the device's function, its metadata, constants); without hooks of Triton's profilers
_COMPILED: dict[Hashable, tuple[Any, Any, Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any], form: Hashable | None
) -> None:
    """Run `programs` programs of a kernel whose constexpr parameters come last, on the current device and stream.

    arguments   for its other parameters, in their order;  constants   the constexpr ones, and options of the launch
    form        equal for two launches only if the same compiled kernel serves both: it names the kernel, the device,
                constants, the types and the alignment of tensors, and the integers that Triton specializes on; None:
                Triton looks it up
    """
    found = _COMPILED.get(form) if form is not None else None
    if found is not None:
        run, function, metadata, last = found
        try:
            run(programs, 1, 1, _stream(), function, metadata, None, None, None, *arguments, *last)
            return
        except TypeError:  # a version whose compiled kernels are called otherwise; nothing has been launched
            del _COMPILED[form]
            form = None
    compiled = kernel[(programs,)](*arguments, **constants)
    if form is not None and getattr(compiled, "function", None) is not None:  # the interpreter compiles nothing
        last = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        _COMPILED[form] = compiled.run, compiled.function, compiled.packed_metadata, last


def _stream() -> int:
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def integer(n: int) -> int:
    """What Triton compiles a kernel for, of an integer argument: equal for integers that share a form."""
    return 16 if n % 16 == 0 else 1 if n == 1 else 0
