"""Triton's interpreter without the bookkeeping that it repeats for every call: the same operations on the same arrays.

    TRITON_INTERPRET=1 python -m tests.kernels.triton.quick tests.kernels.triton.parity [ARGUMENT ...]

runs a module as a program. More than half of an interpreted kernel's time goes into what this leaves out:
  - the 64-bit repetition of every integer sum and product, whose result the interpreter drops unless it debugs,
  - putting its functions in the place of those of triton.language for every call inside a kernel, where they are,
  - a dictionary of all types for every look-up, checks and lists for every shape, known or not.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

KNOWN = ("3.7.",)  # whose interpreter was read for this; others run as they are


def hurry() -> None:
    """Change the interpreter of this process; before or after kernels are imported."""
    if not triton.__version__.startswith(KNOWN):
        return
    builder: Any = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)
    _patch_once()
    _remember_types()
    _remember_shapes()


def _patch_once() -> None:
    """One exchange of triton.language's functions for each module that has kernels, for the process's whole life."""
    patch: Any = interpreter._patch_lang
    patched: set[int] = set()  # by the modules' dictionaries

    def once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            patch(fn)
        return interpreter._LangPatchScope()  # nothing to restore after a launch

    interpreter._patch_lang = once


def _remember_types() -> None:
    """The type in numpy of each of Triton's by its name."""
    look_up = interpreter._get_np_dtype
    known: dict[str, np.dtype] = {}

    def remembered(kind: Any) -> np.dtype:
        name = kind.scalar.name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    interpreter._get_np_dtype = remembered


def _remember_shapes() -> None:
    """The parts of tensors and of their types that follow from a shape alone."""
    core: Any = tl.core
    check, equal = core.block_type.__init__, core.tuple.__eq__
    yes, scalar = core.constexpr(True), (core.constexpr(1), core.tuple([]))

    @lru_cache(maxsize=None, typed=True)
    def parts(*shape: int) -> tuple[Any, int, tuple[Any, Any]]:
        """(shape, number of elements) of a type, and (number, shape) of a tensor that has it."""
        found = core.block_type.__new__(core.block_type)
        check(found, core.int32, list(shape))
        return found.shape, found.numel, (core.constexpr(found.numel), core.tuple([core.constexpr(n) for n in shape]))

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, self.of_tensors = parts(*[getattr(n, "value", n) for n in shape])
        self.name = f"<{self.shape}, {element_ty}>"

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensors if type.is_block() else scalar

    core.block_type.__init__ = make_type
    core.tensor.__init__ = make_tensor
    core.tuple.__eq__ = lambda self, other: yes if self is other else equal(self, other)


if __name__ == "__main__":
    hurry()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
