"""fp4dist's parts for models that Megatron's own builders make: any bias, norm, activation and number of experts.

`StockSpecProvider` stands where Megatron-core's LocalSpecProvider does. `Fp4SpecProvider`, its base, is for one's own
layer specs; they differ in the norm only, which here may be Transformer Engine's.
"""

from __future__ import annotations

from fp4dist.megatron.norm import fused_norm
from fp4dist.megatron.provider import Fp4SpecProvider


class StockSpecProvider(Fp4SpecProvider):
    """Our linears and experts; attention and norms from Transformer Engine where it runs, else from torch."""

    def __init__(self) -> None:
        super().__init__("fp4dist")

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """A class that reads the kind of norm from the config."""
        return fused_norm()
