"""SPEED: faster ways to obtain the bits that `fp4dist.numerics` defines; each op is chosen once, loudly.

Importing this package registers every backend that is there; one that is not leaves its reason in the registry.
"""

from __future__ import annotations

from fp4dist.kernels import cuda, reference, triton

__all__ = ["cuda", "reference", "triton"]
