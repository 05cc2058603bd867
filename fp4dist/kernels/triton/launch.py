# pyright: reportCallIssue=false
# (a launch takes options beside the kernel's own parameters)
"""Launching a kernel again without Triton's search for what was compiled, which takes longer than many kernels run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_MOST = 4096  # sizes that are kept

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


def start(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """`launch` of a kernel that is told few things, by a form that is read off tensors and integers."""
    form = id(kernel), *constants.values(), *map(_kind, arguments)  # kernels live as long as the program
    launch(kernel, programs, arguments, constants, form)


def _kind(x: Tensor | int) -> Hashable:
    """All that Triton compiles a kernel for, of an argument."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0, x.device
    return integer(x), -(2**31) <= x < 2**31


class Launch:
    """One kernel under one set of constants, for all matrices that one compiled kernel serves; see `launch`.

    words    places of arguments whose memory the kernel reads or writes as int32. They may be given in any type: what
             is compiled takes their addresses alone, and where Triton has to look they are viewed as words
    halves   likewise, of those that are int16 to it
    """

    __slots__ = ("_compiled", "_constants", "_halves", "_kernel", "_words")

    def __init__(
        self, kernel: Any, constants: dict[str, Any], words: tuple[int, ...] = (), halves: tuple[int, ...] = ()
    ) -> None:
        self._kernel, self._constants, self._words, self._halves = kernel, constants, words, halves
        self._compiled: tuple[Any, Any, Any, tuple[Any, ...]] | Literal[False] | None = None  # False: called otherwise

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Run so many programs on the current device and stream."""
        if self._compiled:
            run, function, metadata, last = self._compiled
            try:
                run(programs, 1, 1, _stream(), function, metadata, None, None, None, *arguments, *last)
                return
            except TypeError:  # nothing has been launched
                self._compiled = False
        typed = self.typed(arguments)
        compiled = self._kernel[(programs,)](*typed, **self._constants)
        if self._compiled is None and getattr(compiled, "function", None) is not None:
            last = tuple(self._constants[name] for name in self._kernel.arg_names[len(typed) :])
            self._compiled = compiled.run, compiled.function, compiled.packed_metadata, last

    def typed(self, arguments: tuple[Any, ...]) -> list[Any]:
        """The arguments as the kernel is compiled for them."""
        found = list(arguments)
        for place in self._words:
            found[place] = _in_words(found[place])
        for place in self._halves:
            found[place] = found[place].view(torch.int16)
        return found


def _in_words(x: Tensor) -> Tensor:
    """The memory of a matrix with dense rows or columns as int32."""
    return (x if x.dim() == 0 or x.stride(-1) == 1 else x.t()).view(torch.int32)


def _stream() -> int:
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def keep(kept: dict[Any, T], at: Hashable, found: T) -> T:
    """`found`, kept under `at` as what is the same for all matrices of one size."""
    if len(kept) > _MOST:  # sizes that are always new, as experts' tokens
        kept.clear()
    kept[at] = found
    return found


def integer(n: int) -> int:
    """What Triton compiles a kernel for, of an integer argument: equal for integers that share a form."""
    return 16 if n % 16 == 0 else 1 if n == 1 else 0
