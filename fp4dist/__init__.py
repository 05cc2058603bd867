"""fp4dist: FP4 pretraining of language models as a one-line choice.

A recipe says which operand of which GEMM is quantized how; kernels obtain exactly the bits that `fp4dist.numerics`
defines. Importing this package does nothing else: no device is touched, no environment variable is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "quantize": "fp4dist.numerics",
    "dequantize": "fp4dist.numerics",
    "matmul": "fp4dist.numerics",
    "Fp4Linear": "fp4dist.nn.linear",
    "apply_recipe": "fp4dist.nn.apply",
    "load_recipe": "fp4dist.spec.load",
}
__all__ = ["Fp4Linear", "__version__", "apply_recipe", "dequantize", "load_recipe", "matmul", "quantize"]

if TYPE_CHECKING:
    from fp4dist.nn.apply import apply_recipe
    from fp4dist.nn.linear import Fp4Linear
    from fp4dist.numerics import dequantize, matmul, quantize
    from fp4dist.spec.load import load_recipe


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import fp4dist` needs no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fp4dist' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
