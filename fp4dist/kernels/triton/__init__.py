"""The Triton backend: the reference's bits in one pass over the data, on any GPU that Triton compiles for.

On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests of their bits alone.
"""

from __future__ import annotations

from importlib import util
from typing import Any

from torch import Tensor

from fp4dist.kernels.registry import Request, declare_missing, kernel
from fp4dist.numerics.matmul import Operand
from fp4dist.numerics.splits import Parts, Place
from fp4dist.spec.recipe import QuantSpec

if util.find_spec("triton") is None:
    declare_missing("triton", "the package triton is not installed")
else:
    from fp4dist.kernels.triton import chosen as _chosen
    from fp4dist.kernels.triton import clamped as _clamped
    from fp4dist.kernels.triton import filters as _filters
    from fp4dist.kernels.triton import largest as _largest
    from fp4dist.kernels.triton import matmul as _matmul
    from fp4dist.kernels.triton import originals as _originals
    from fp4dist.kernels.triton import quantizers as _quantizers
    from fp4dist.kernels.triton import slopes as _slopes
    from fp4dist.kernels.triton import wire as _wire

    def _needs_gpu(request: Request) -> str | None:
        return None if request.device.type == "cuda" else f"needs a GPU, the tensor is on {request.device.type}"

    def _supports_quantize(request: Request) -> str | None:
        return _needs_gpu(request) or (
            _quantizers.why_not(request.spec) if request.spec is not None else "needs a spec"
        )

    def _supports_filter(request: Request) -> str | None:
        return _needs_gpu(request) or (_filters.why_not(request.spec) if request.spec is not None else "needs a spec")

    kernel("mask", backend="triton", supports=_supports_filter)(_filters.mask)
    kernel("filter_by_mask", backend="triton", supports=_supports_filter)(_filters.filter_by_mask)
    kernel("filter_by_scales", backend="triton", supports=_supports_filter)(_filters.filter_by_scales)

    kernel("original", backend="triton", supports=_needs_gpu, sums=True)(_originals.original)

    def _supports_slope(request: Request) -> str | None:
        return _needs_gpu(request) or _slopes.why_not(request.spec)

    kernel("slope", backend="triton", supports=_supports_slope, sums=True)(_slopes.slope)

    _PARTS = (_clamped, _largest, _chosen)

    def _supports_channels(request: Request) -> str | None:
        return _needs_gpu(request) or _chosen.why_not(request.spec)

    def _supports_parts(request: Request) -> str | None:
        return _needs_gpu(request) or next(
            (None for k in _PARTS if k.why_not(request.spec) is None), "takes no such part out"
        )

    def _decompose(x: Tensor, spec: QuantSpec, place: Place) -> Parts:
        return next((k for k in _PARTS if k.why_not(spec) is None), _clamped).decompose(x, spec, place)

    kernel("decompose", backend="triton", supports=_supports_parts, sums=True)(_decompose)
    kernel("take_channels", backend="triton", supports=_supports_channels, sums=True)(_chosen.take_channels)
    kernel("in_precision", backend="triton", supports=_supports_channels, sums=True)(_chosen.in_precision)
    kernel("hot_residual", backend="triton", supports=_supports_channels, sums=True)(_chosen.hot_residual)

    def _supports_pair(request: Request) -> str | None:
        if request.spec is None or request.other is None:
            return "needs two specs"
        return _needs_gpu(request) or _quantizers.why_not_pair(request.spec, request.other)

    def _quantize_pair(x: Tensor, row: tuple[Any, ...], column: tuple[Any, ...]) -> tuple[Operand, Operand]:
        return _quantizers.quantize_pair(x, _quantizers.Side(*row), _quantizers.Side(*column))

    kernel("quantize", backend="triton", supports=_supports_quantize, carries=True)(_quantizers.quantize)
    kernel("requantize", backend="triton", supports=_supports_quantize, carries=True, unrotates=True)(
        _quantizers.requantize
    )
    kernel("quantize_pair", backend="triton", supports=_supports_pair)(_quantize_pair)
    kernel("to_carrier", backend="triton", supports=_supports_quantize)(_quantizers.to_carrier)
    kernel("dequantize", backend="triton", supports=_needs_gpu, sums=True)(_matmul.dequantize)
    kernel("matmul", backend="triton", supports=_needs_gpu, carrier_types=_matmul.carrier_types, sums=True)(
        _matmul.matmul
    )
    kernel("grouped_matmul", backend="triton", supports=_needs_gpu)(_matmul.grouped_matmul)
    kernel("wire_encode", backend="triton", supports=_needs_gpu)(_wire.encode)
    kernel("wire_accumulate", backend="triton", supports=_needs_gpu)(_wire.accumulate)
    kernel("wire_recode", backend="triton", supports=_needs_gpu)(_wire.recode)
    kernel("wire_sum_plain", backend="triton", supports=_needs_gpu)(_wire.sum_plain)
