"""The fitted constants of the time model, and the file that holds them."""

from __future__ import annotations

import dataclasses
from functools import cache

from fp4dist.spec.cluster import Precision
from fp4dist.spec.frozen import frozen
from fp4dist.spec.load import load_spec


@frozen
class Constants:
    """Twelve numbers for every model, GPU count and layout (`tools/calibrate_planner.py` fits them).

    bf16 fp8 mxfp8 nvfp4   share of the tensor cores' peak that a large GEMM reaches, operands ready
    attention              share of the bf16 peak that causal attention reaches
    memory                 share of the memory's peak bandwidth that elementwise kernels reach
    gap_us                 idle time after each kernel
    tensor, data           share of the tensor-parallel and data-parallel traffic's time that computation does not hide
    expert                 time of the experts' all-to-all relative to its bytes at the link's bandwidth
    scan                   speed of state-space scan kernels relative to elementwise ones, by their bytes
    power                  exponent: how sustained rates follow the power that a GPU has for each peak FLOP
    """

    bf16: float
    fp8: float
    mxfp8: float
    nvfp4: float
    attention: float
    memory: float
    gap_us: float
    tensor: float
    data: float
    expert: float
    scan: float
    power: float

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if getattr(self, f.name) <= 0:
                raise ValueError(f"{f.name} = {getattr(self, f.name)} must be positive")

    def gemm(self, precision: Precision) -> float:
        """Share of the peak in `precision`."""
        return {"bf16": self.bf16, "fp8": self.fp8, "mxfp8": self.mxfp8, "nvfp4": self.nvfp4}[precision]


@frozen
class Calibration:
    """What `configs/calibration/fitted.yaml` holds."""

    constants: Constants
    error: (
        float  # the 90 % quantile of |relative error| of rows left out of the fit: the interval that `predict` prints
    )


@cache
def fitted() -> Calibration:
    """The shipped constants."""
    return load_spec(Calibration, "calibration", "fitted")
