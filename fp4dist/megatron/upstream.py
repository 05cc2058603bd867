"""Everything that fp4dist's GPT takes from Megatron-core, imported in one place.

Importing this module checks that a supported megatron-core is there and then imports it without the six warnings
that it gives about a missing Apex or Transformer Engine, which are optional. Code of ours that imports
`megatron.core` directly should import this module first.

`tests/megatron/test_upstream.py` holds the signatures we rely on, so that an upgrade fails there, by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from fp4dist.errors import DependencyError

OLDEST, NEWEST = (0, 16), (0, 20)  # minor versions that the tests were run with, both included
_INSTALL = 'pip install "megatron-core>=0.16,<0.21"'
_KNOWN_WARNINGS = (
    r"Apex is not installed\. Falling back to Torch Norm",
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"full scope is deprecated\. Use empty cuda_graph_scope",  # about a default of its own TransformerConfig
)


def check_megatron() -> tuple[int, int, int]:
    """The version of the installed megatron-core, found without importing it.

    raises  DependencyError when megatron-core is missing or is outside 0.16 to 0.20
    """
    if find_spec("megatron") is None or (spec := find_spec("megatron.core")) is None:
        raise DependencyError(f"megatron-core is not installed; engine, data and model need it: {_INSTALL}")
    # read as text: from 0.20 on, executing the file starts a git process
    file = Path(next(iter(spec.submodule_search_locations or ["."])), "package_info.py")
    if not file.is_file():
        raise DependencyError(
            f"megatron.core in {file.parent} has no package_info.py, so it is not NVIDIA's megatron-core;"
            f" remove it, then: {_INSTALL}"
        )
    found = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    version = (int(found.get("MAJOR", 0)), int(found.get("MINOR", 0)), int(found.get("PATCH", 0)))
    if not OLDEST <= version[:2] <= NEWEST:
        raise DependencyError(
            f"megatron-core {'.'.join(map(str, version))} in {file.parent} is not supported; fp4dist is tested with"
            f" {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}: {_INSTALL}"
        )
    return version


@contextmanager
def without_known_warnings() -> Generator[None]:
    """Silence what Megatron-core says at import and of its own defaults, and nothing else."""
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


MEGATRON_VERSION = check_megatron()

with without_known_warnings():
    # the engines use these two: imported here so that their warnings are silenced as well
    import megatron.core.distributed
    import megatron.core.optimizer  # noqa: F401
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

__all__ = [
    "MEGATRON_VERSION",
    "AttnMaskType",
    "BackendSpecProvider",
    "ColumnParallelLinear",
    "GPTModel",
    "IdentityOp",
    "MLPSubmodules",
    "MegatronModule",
    "ModuleSpec",
    "PackedSeqParams",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "SequentialMLP",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "check_megatron",
    "get_bias_dropout_add",
    "get_cuda_rng_tracker",
    "get_mlp_module_spec_for_backend",
    "get_num_layers_to_build",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "tensor_parallel",
    "without_known_warnings",
]
