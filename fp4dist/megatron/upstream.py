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
from typing import Any

import torch

from fp4dist.errors import ConfigError, DependencyError

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


def transformer_engine() -> Any:
    """megatron.core.extensions.transformer_engine where its classes can run (a GPU, TE installed), else None."""
    if not torch.cuda.is_available() or find_spec("transformer_engine") is None:
        return None
    from megatron.core.extensions import transformer_engine as extension

    return extension if extension.HAVE_TE else None


def refuse_fp4_switch(config: Any) -> None:
    """Refuse TransformerConfig.fp4, which does nothing in a model without Transformer Engine's linears; ConfigError."""
    if getattr(config, "fp4", None):
        raise ConfigError(
            f"TransformerConfig.fp4 = {config.fp4!r} (--fp4-format): Megatron-core hands it to Transformer Engine's"
            " linears, which this model does not have, so it would silently do nothing; leave it out and apply a"
            " recipe: fp4dist.megatron.install(...) or fp4dist.megatron.apply(chunks, ...)"
        )


def forget_aux_losses() -> None:
    """Empty Megatron's log of the routers' losses, which has a place for each layer of the first model that used it."""
    if find_spec("megatron.core.transformer.moe.moe_logging") is None:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
        return
    from megatron.core.transformer.moe import moe_logging  # pyright: ignore[reportAttributeAccessIssue]

    moe_logging.destroy_moe_metrics_tracker()


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
    from megatron.core.models.common.embeddings import rope_utils
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
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
        get_transformer_layer_offset,
    )

# Without Transformer Engine the router of 0.16 asks `te_general_gemm is not None` of a name that it has not defined
# (NameError, on a GPU too); later versions set it to None.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]

__all__ = [
    "MEGATRON_VERSION",
    "MLP",
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
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "check_megatron",
    "forget_aux_losses",
    "get_bias_dropout_add",
    "get_cuda_rng_tracker",
    "get_mlp_module_spec_for_backend",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "model_parallel_cuda_manual_seed",
    "moe_utils",
    "parallel_state",
    "refuse_fp4_switch",
    "rope_utils",
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "tensor_parallel",
    "token_dispatcher",
    "without_known_warnings",
]
