"""The one decorator of every spec class: frozen, keyword-only, slotted, hence hashable and shareable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make `cls` a frozen keyword-only dataclass with slots; its `__post_init__` checks cross-field rules."""
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)
