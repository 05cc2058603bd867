"""The contract with Megatron-core: each signature that fp4dist relies on, and the guard on its version.

A failure here says "megatron-core X changed Y": adapt fp4dist/megatron and fp4dist/train, then this list.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fp4dist.errors import DependencyError
from fp4dist.megatron import upstream
from fp4dist.megatron.attention import SdpaAttention
from fp4dist.megatron.cpu import RETARGETED
from fp4dist.megatron.norm import RMSNorm
from fp4dist.megatron.provider import Fp4SpecProvider
from fp4dist.megatron.upstream import MEGATRON_VERSION

LINEAR = "input_size output_size config init_method bias skip_bias_add stride is_expert tp_comm_buffer_name tp_group"
LAYERS, CHECKPOINTS = "megatron.core.tensor_parallel.layers", "megatron.core.dist_checkpointing"

# place -> names that its parameters (or dataclass fields) must still include
PARAMETERS = {
    f"{LAYERS}:ColumnParallelLinear.__init__": f"{LINEAR} gather_output skip_weight_param_allocation",
    f"{LAYERS}:ColumnParallelLinear.forward": "input_ weight runtime_gather_output",
    f"{LAYERS}:ColumnParallelLinear._forward_impl": "input weight args kwargs",
    f"{LAYERS}:RowParallelLinear.__init__": f"{LINEAR} input_is_parallel",
    f"{LAYERS}:RowParallelLinear.forward": "input_",
    f"{LAYERS}:RowParallelLinear._forward_impl": "input weight args kwargs",
    "megatron.core.models.gpt:GPTModel.__init__": "config transformer_layer_spec vocab_size max_sequence_length"
    " pre_process post_process parallel_output share_embeddings_and_output_weights position_embedding_type rotary_base"
    " vp_stage",
    "megatron.core.models.gpt:GPTModel.forward": "input_ids position_ids attention_mask labels",
    "megatron.core.models.gpt:GPTModel.setup_embeddings_and_output_layer": "self",
    "megatron.core.models.gpt:GPTModel.sharded_state_dict": "prefix sharded_offsets metadata",
    "megatron.core.models.gpt.gpt_layer_specs:get_mlp_module_spec_for_backend": "backend",
    "megatron.core.transformer.transformer_block:get_num_layers_to_build": "config vp_stage pp_rank",
    "megatron.core.transformer.transformer_block:TransformerBlockSubmodules": "layer_specs layer_norm",
    "megatron.core.transformer.transformer_layer:TransformerLayerSubmodules": "input_layernorm self_attention"
    " self_attn_bda pre_mlp_layernorm mlp mlp_bda sharded_state_dict_keys_map",
    "megatron.core.transformer.attention:SelfAttentionSubmodules": "linear_qkv core_attention linear_proj q_layernorm"
    " k_layernorm",
    "megatron.core.transformer.mlp:MLPSubmodules": "linear_fc1 linear_fc2",
    "megatron.core.distributed:DistributedDataParallel.__init__": "config ddp_config module",
    "megatron.core.distributed:DistributedDataParallelConfig": "use_distributed_optimizer grad_reduce_in_fp32"
    " overlap_grad_reduce overlap_param_gather",
    "megatron.core.distributed:finalize_model_grads": "model num_tokens",
    "megatron.core.optimizer:get_megatron_optimizer": "config model_chunks use_gloo_process_groups",
    "megatron.core.optimizer:OptimizerConfig": "optimizer lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad bf16"
    " params_dtype use_distributed_optimizer",
    f"{CHECKPOINTS}:save": "sharded_state_dict checkpoint_dir",
    f"{CHECKPOINTS}:load": "sharded_state_dict checkpoint_dir",
    "megatron.core.parallel_state:initialize_model_parallel": "tensor_model_parallel_size pipeline_model_parallel_size"
    " context_parallel_size create_gloo_process_groups",
    "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining": "forward_step_func data_iterator model"
    " num_microbatches seq_length micro_batch_size forward_only",
    "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving": "forward_step_func"
    " data_iterator model num_microbatches seq_length micro_batch_size forward_only p2p_communicator pg_collection",
    "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator.__init__": "pp_group config",
    "megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate": "tensor_send_next"
    " tensor_send_prev recv_prev recv_next tensor_shape wait_on_reqs",
    "megatron.core.tensor_parallel.random:model_parallel_cuda_manual_seed": "seed",
    "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.add": "name seed",
    "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork": "name",
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state": "device clone graph_safe",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": "new_state device graph_safe",
}

# Megatron's class -> ours, which Megatron calls in its place: every parameter of theirs has to be one of ours
REPLACED = {
    "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__": SdpaAttention.__init__,
    "megatron.core.transformer.dot_product_attention:DotProductAttention.forward": SdpaAttention.forward,
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": RMSNorm.__init__,
    **{
        f"megatron.core.models.backends:BackendSpecProvider.{name}": getattr(Fp4SpecProvider, name)
        for name in (
            "column_parallel_linear",
            "row_parallel_linear",
            "fuse_layernorm_and_linear",
            "column_parallel_layer_norm_linear",
            "layer_norm",
            "core_attention",
            "grouped_mlp_modules",
            "activation_func",
        )
    },
}


def find(place: str) -> Any:
    """The object at module:qualified.name."""
    module, name = place.split(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"megatron-core {MEGATRON_VERSION} has no {place}: {part} is gone"
        found = getattr(found, part)
    return found


def names_of(place: str) -> set[str]:
    found = find(place)
    if dataclasses.is_dataclass(found):
        return {field.name for field in dataclasses.fields(found)}
    return set(inspect.signature(found).parameters)


@pytest.mark.parametrize("place", PARAMETERS)
def test_signatures_that_we_call(place: str) -> None:
    missing = set(PARAMETERS[place].split()) - names_of(place)
    assert not missing, f"megatron-core {MEGATRON_VERSION} changed {place}: it no longer has {sorted(missing)}"


@pytest.mark.parametrize("place", REPLACED)
def test_signatures_that_we_replace(place: str) -> None:
    new = names_of(place) - set(inspect.signature(REPLACED[place]).parameters) - {"cls", "self"}
    assert not new, f"megatron-core {MEGATRON_VERSION} changed {place}: new parameters {sorted(new)}"


def test_the_provider_is_complete() -> None:
    asked = set(upstream.BackendSpecProvider.__abstractmethods__)  # type: ignore[attr-defined]
    known = {place.rsplit(".", 1)[1] for place in REPLACED if "BackendSpecProvider" in place}
    assert asked == known, f"megatron-core {MEGATRON_VERSION} changed BackendSpecProvider: {sorted(asked ^ known)}"


@pytest.mark.parametrize("name", ["ColumnParallelLinear", "RowParallelLinear"])
def test_forward_impl_is_called_with_keywords(name: str) -> None:
    """Our linears read these keywords; a positional argument would be lost."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(find(f"{LAYERS}:{name}.forward"))))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "self._forward_impl"]
    assert len(calls) == 1, f"megatron-core {MEGATRON_VERSION} changed {name}.forward: {len(calls)} _forward_impl calls"
    expected = {"input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"}
    missing = (expected | {"tp_group"}) - {keyword.arg for keyword in calls[0].keywords}
    assert not missing, f"megatron-core {MEGATRON_VERSION} calls {name}._forward_impl without {sorted(missing)}"
    assert not calls[0].args, f"megatron-core {MEGATRON_VERSION} calls {name}._forward_impl with positional arguments"


def test_the_modules_of_the_cpu_shims_exist() -> None:
    for name in RETARGETED:
        importlib.import_module(name)
    from megatron.core.tensor_parallel import random

    for name in ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED", "_MODEL_PARALLEL_RNG_TRACKER_NAME"):
        assert hasattr(random, name), f"megatron-core {MEGATRON_VERSION} changed tensor_parallel.random: no {name}"


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, info: str | None) -> None:
    """Pretend that `folder` is the installed megatron.core."""
    if info is not None:
        (folder / "package_info.py").write_text(info)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(upstream, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("version", "good"), [((0, 15, 3), False), ((0, 16, 0), True), ((0, 20, 9), True), ((0, 21, 0), False)]
)
def test_supported_versions(
    version: tuple[int, int, int], good: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, "MAJOR = {}\nMINOR = {}\nPATCH = {}\nPRE_RELEASE = ''\n".format(*version))
    if good:
        assert upstream.check_megatron() == version
        return
    with pytest.raises(DependencyError, match=r"0\.\d+\.\d in .* is not supported; .*0\.16 to 0\.20: pip install"):
        upstream.check_megatron()


def test_a_missing_or_unrelated_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, None)
    with pytest.raises(DependencyError, match="it is not NVIDIA's megatron-core"):
        upstream.check_megatron()
    monkeypatch.setattr(upstream, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"megatron-core is not installed; .* pip install"):
        upstream.check_megatron()


def test_importing_is_quiet_and_late() -> None:
    """fp4dist.megatron imports nothing of Megatron by itself, and importing Megatron through it warns of nothing."""
    program = """
        import sys
        import fp4dist.megatron, fp4dist.megatron.sites
        assert "megatron.core" not in sys.modules
        import warnings
        from fp4dist.megatron import build_gpt
        assert "megatron.core" in sys.modules
        warnings.warn("others are still heard")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "others are still heard" in done.stderr
    assert "Apex" not in done.stderr
