"""Megatron-core with fp4dist's layers: a GPT builder, the linears, and what Megatron needs where no GPU is.

Importing this package does nothing; each name below is imported on first use. `gpt_sites`, `count_parameters` and
`flops_per_token` work without megatron-core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Fp4ColumnParallelLinear": "fp4dist.megatron.layers",
    "Fp4ParamGather": "fp4dist.megatron.param_gather",
    "Fp4RowParallelLinear": "fp4dist.megatron.layers",
    "Fp4SpecProvider": "fp4dist.megatron.provider",
    "apply": "fp4dist.megatron.chunks",
    "block_spec": "fp4dist.megatron.provider",
    "build_gpt": "fp4dist.megatron.provider",
    "check_megatron": "fp4dist.megatron.upstream",
    "count_parameters": "fp4dist.megatron.sites",
    "flops_per_token": "fp4dist.megatron.sites",
    "gpt_sites": "fp4dist.megatron.sites",
    "install": "fp4dist.megatron.pipeline",
    "install_cpu_shims": "fp4dist.megatron.cpu",
    "transformer_config": "fp4dist.megatron.provider",
}
__all__ = [
    "Fp4ColumnParallelLinear",
    "Fp4ParamGather",
    "Fp4RowParallelLinear",
    "Fp4SpecProvider",
    "apply",
    "block_spec",
    "build_gpt",
    "check_megatron",
    "count_parameters",
    "flops_per_token",
    "gpt_sites",
    "install",
    "install_cpu_shims",
    "transformer_config",
]

if TYPE_CHECKING:
    from fp4dist.megatron.chunks import apply
    from fp4dist.megatron.cpu import install_cpu_shims
    from fp4dist.megatron.layers import Fp4ColumnParallelLinear, Fp4RowParallelLinear
    from fp4dist.megatron.param_gather import Fp4ParamGather
    from fp4dist.megatron.pipeline import install
    from fp4dist.megatron.provider import Fp4SpecProvider, block_spec, build_gpt, transformer_config
    from fp4dist.megatron.sites import count_parameters, flops_per_token, gpt_sites
    from fp4dist.megatron.upstream import check_megatron


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fp4dist.megatron' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
