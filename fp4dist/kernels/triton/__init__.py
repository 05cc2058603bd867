"""The Triton backend: the reference's bits in one pass over the data, on any GPU that Triton compiles for.

On a CPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests of their bits alone.
"""

from __future__ import annotations

from importlib import util

from fp4dist.kernels.registry import Request, declare_missing, kernel

if util.find_spec("triton") is None:
    declare_missing("triton", "the package triton is not installed")
else:
    from fp4dist.kernels.triton import matmul as _matmul
    from fp4dist.kernels.triton import quantize as _quantize

    def _needs_gpu(request: Request) -> str | None:
        return None if request.device.type == "cuda" else f"needs a GPU, the tensor is on {request.device.type}"

    def _supports_quantize(request: Request) -> str | None:
        return _needs_gpu(request) or (_quantize.why_not(request.spec) if request.spec is not None else "needs a spec")

    kernel("quantize", backend="triton", supports=_supports_quantize)(_quantize.quantize)
    kernel("requantize", backend="triton", supports=_supports_quantize)(_quantize.requantize)
    kernel("dequantize", backend="triton", supports=_needs_gpu)(_matmul.dequantize)
    kernel("matmul", backend="triton", supports=_needs_gpu)(_matmul.matmul)
