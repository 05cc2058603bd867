"""The contract with Megatron-core: each signature that fp4dist relies on, and the guard on its version.

A failure here says "megatron-core X changed Y": adapt fp4dist/megatron and fp4dist/train, then this list.

Tested is the installed version. Other versions are read, not imported, where their sources are at hand:

    MEGATRON_TREES=/src/core_v0.17.1:/src/core_v0.20.0 pytest tests/megatron/test_upstream.py

Each tree is a folder that holds `megatron/`, such as a checkout or an unpacked wheel.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
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
from fp4dist.megatron.norm import LayerNorm, Norm, RMSNorm
from fp4dist.megatron.pipeline import FINAL_NORMS, MODEL_BUILDERS, PROVIDERS
from fp4dist.megatron.provider import Fp4SpecProvider
from fp4dist.megatron.stock import StockSpecProvider
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
    "megatron.core.models.gpt:GPTModel.compute_language_model_loss": "labels logits",
    "megatron.core.transformer.attention:SelfAttention.get_query_key_value_tensors": "hidden_states key_value_states"
    " output_gate split_qkv",
    "megatron.core.transformer.attention:SelfAttention.forward": "hidden_states attention_mask key_value_states"
    " inference_context rotary_pos_emb packed_seq_params",
    "megatron.core.models.gpt:GPTModel.sharded_state_dict": "prefix sharded_offsets metadata",
    "megatron.core.models.gpt.gpt_layer_specs:get_mlp_module_spec_for_backend": "backend num_experts moe_grouped_gemm",
    "megatron.core.transformer.transformer_block:get_num_layers_to_build": "config vp_stage pp_rank",
    "megatron.core.transformer.transformer_block:TransformerBlockSubmodules": "layer_specs layer_norm",
    "megatron.core.transformer.transformer_layer:TransformerLayerSubmodules": "input_layernorm self_attention"
    " self_attn_bda pre_mlp_layernorm mlp mlp_bda sharded_state_dict_keys_map",
    "megatron.core.transformer.attention:SelfAttentionSubmodules": "linear_qkv core_attention linear_proj q_layernorm"
    " k_layernorm",
    "megatron.core.transformer.mlp:MLPSubmodules": "linear_fc1 linear_fc2",
    "megatron.core.transformer.mlp:MLP.forward": "hidden_states per_token_scale",
    "megatron.core.transformer.moe.experts:SequentialMLP.__init__": "num_local_experts config submodules pg_collection",
    "megatron.core.transformer.moe.experts:SequentialMLP.forward": "permuted_local_hidden_states tokens_per_expert"
    " permuted_probs",
    "megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": "point"
    " tokens_per_expert",
    "megatron.core.transformer.transformer_layer:get_transformer_layer_offset": "config vp_stage pp_rank",
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
    " context_parallel_size create_gloo_process_groups order",
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
    "megatron.core.parallel_state:get_expert_model_parallel_group": "check_initialized",
    "megatron.core.parallel_state:get_data_parallel_rank": "with_context_parallel",
    "megatron.core.num_microbatches_calculator:get_num_microbatches": "",
    "megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec": "config use_transformer_engine",
    "megatron.core.transformer:TransformerConfig": "fp4 cuda_graph_impl mtp_num_layers qk_layernorm"
    " overlap_moe_expert_parallel_comm normalization layernorm_zero_centered_gamma use_cpu_initialization"
    " num_moe_experts moe_router_topk moe_router_pre_softmax moe_ffn_hidden_size moe_shared_expert_intermediate_size"
    " moe_layer_freq moe_router_load_balancing_type moe_aux_loss_coeff moe_router_dtype moe_token_dispatcher_type"
    " moe_grouped_gemm moe_apply_probs_on_input expert_model_parallel_size expert_tensor_parallel_size",
}

# place -> version from which on -> exactly these parameters; "" where the place does not exist
CHANGED: dict[str, dict[tuple[int, int], str]] = {
    "megatron.core.models.backends:LocalSpecProvider.layer_norm": {
        (0, 16): "self rms_norm for_qk",
        (0, 17): "self rms_norm for_qk has_residual",
    },
    "megatron.core.models.backends:LocalSpecProvider.grouped_mlp_modules": {
        (0, 16): "self moe_use_grouped_gemm moe_use_legacy_grouped_gemm",
        (0, 17): "self moe_use_grouped_gemm",
    },
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": {
        (0, 16): "cls config hidden_size eps persist_layer_norm zero_centered_gamma normalization",
    },
}

# what install() binds anew in Megatron-core
REBOUND = [f"{module}:LocalSpecProvider" for module in PROVIDERS] + [":".join(pair) for pair in FINAL_NORMS.items()]

# Megatron-LM's training package is not in the wheel: read from trees only
TRAINING = {
    "megatron.training.training:get_model": {(0, 16): "model_provider_func model_type"},
    "megatron.training.models.dist_utils:unimodal_build_distributed_models": {
        (0, 16): "",
        (0, 18): "build_model_func transformer_config pg_collection",
    },
    "megatron.training.models.gpt:unimodal_build_distributed_models": {(0, 16): "", (0, 19): "build_model_func"},
    "megatron.training.training:train": {(0, 16): "model"},
    "megatron.training.global_vars:get_args": {(0, 16): " "},
}
# names of Megatron-LM's arguments that install() reads
ARGUMENTS = "curr_iteration train_iters micro_batch_size seq_length seed"

# Megatron's class -> ours, which Megatron calls in its place: every parameter of theirs has to be one of ours
REPLACED = {
    "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__": SdpaAttention.__init__,
    "megatron.core.transformer.dot_product_attention:DotProductAttention.forward": SdpaAttention.forward,
    "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__": Norm.__new__,
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


class Installed:
    """The megatron-core that this interpreter imports."""

    version = MEGATRON_VERSION

    def find(self, place: str) -> Any:
        """The object at module:qualified.name."""
        module, name = place.split(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            assert hasattr(found, part), f"megatron-core {self.version} has no {place}: {part} is gone"
            found = getattr(found, part)
        return found

    def names_of(self, place: str) -> set[str]:
        """Parameters of a function, or fields of a dataclass."""
        found = self.find(place)
        if dataclasses.is_dataclass(found):
            return {field.name for field in dataclasses.fields(found)}
        return set(inspect.signature(found).parameters)

    def tree_of(self, place: str) -> ast.AST:
        """The syntax tree of a function."""
        return ast.parse(textwrap.dedent(inspect.getsource(self.find(place))))

    def has(self, place: str) -> bool:
        """Whether there is something at `place`."""
        module, name = place.split(":")
        return hasattr(importlib.import_module(module), name)


class Tree:
    """Another version, read from its sources."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        info = (self.root / "megatron/core/package_info.py").read_text()
        found = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", info, re.MULTILINE))
        self.version = (int(found["MAJOR"]), int(found["MINOR"]), int(found["PATCH"]))

    def file(self, module: str) -> Path | None:
        """The file of a module."""
        path = self.root.joinpath(*module.split("."))
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

    def names_in(self, module: str) -> dict[str, ast.AST]:
        """Name -> what binds it in a module, also below `if` and `try`."""
        file = self.file(module)
        if file is None:
            return {}
        names: dict[str, ast.AST] = {}
        todo = list(ast.parse(file.read_text()).body)
        while todo:
            node = todo.pop()
            for part in ("body", "orelse", "finalbody"):
                todo += getattr(node, part, []) if isinstance(node, ast.If | ast.Try | ast.With) else []
            if isinstance(node, ast.Try):
                todo += [statement for handler in node.handlers for statement in handler.body]
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names[node.name] = node
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names |= {alias.asname or alias.name: node for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        return names

    def has(self, place: str) -> bool:
        """Whether there is something at `place`."""
        module, name = place.split(":")
        return name in self.names_in(module)

    def resolve(self, module: str, name: str) -> tuple[str, ast.AST]:
        """Follow imports to the class or function."""
        node = self.names_in(module).get(name)
        assert node is not None, f"megatron-core {self.version} has no {module}:{name}"
        if isinstance(node, ast.ImportFrom):
            package = (
                module
                if self.file(module) == self.root.joinpath(*module.split("."), "__init__.py")
                else (module.rpartition(".")[0])
            )
            parents = package.split(".")[: len(package.split(".")) - max(node.level - 1, 0)]
            source = ".".join([*parents, *filter(None, [node.module])]) if node.level else str(node.module)
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            return self.resolve(source, original)
        return module, node

    def tree_of(self, place: str) -> ast.AST:
        """The definition at `place`, looked up through imports and base classes."""
        module, qualified = place.split(":")
        owner, *method = qualified.split(".")
        module, node = self.resolve(module, owner)
        for name in method:
            assert isinstance(node, ast.ClassDef)
            inside = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name]
            if inside:
                node = inside[0]
                continue
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            assert bases, f"megatron-core {self.version} has no {place}: {name} is gone"
            return self.tree_of(f"{module}:{bases[0]}.{name}")
        return node

    def names_of(self, place: str) -> set[str]:
        """Parameters of a function, or fields of a dataclass and its bases."""
        node = self.tree_of(place)
        if isinstance(node, ast.FunctionDef):
            a = node.args
            return {arg.arg for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]}
        assert isinstance(node, ast.ClassDef)
        module = self.resolve(*place.split(":"))[0]  # type: ignore[arg-type]
        fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        known = self.names_in(module)
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in known:
                fields |= self.names_of(f"{module}:{base.id}")
        return fields


UPSTREAM = [Installed(), *(Tree(root) for root in filter(None, os.environ.get("MEGATRON_TREES", "").split(":")))]
every_version = pytest.mark.parametrize("megatron", UPSTREAM, ids=lambda m: ".".join(map(str, m.version)))
every_tree = pytest.mark.parametrize(
    "megatron",
    [tree for tree in UPSTREAM if isinstance(tree, Tree)]
    or [pytest.param(None, marks=pytest.mark.skip(reason="MEGATRON_TREES names no source tree"))],
    ids=lambda m: ".".join(map(str, m.version)) if m else "none",
)
Upstream = Installed | Tree


def due(versions: dict[tuple[int, int], str], version: tuple[int, int, int]) -> str:
    """The entry of the newest version that is not newer than `version`."""
    return versions[max(known for known in versions if known <= version[:2])]


@every_version
@pytest.mark.parametrize("place", PARAMETERS)
def test_signatures_that_we_call(place: str, megatron: Upstream) -> None:
    missing = set(PARAMETERS[place].split()) - megatron.names_of(place)
    assert not missing, f"megatron-core {megatron.version} changed {place}: it no longer has {sorted(missing)}"


@every_version
@pytest.mark.parametrize("place", REPLACED)
def test_signatures_that_we_replace(place: str, megatron: Upstream) -> None:
    new = megatron.names_of(place) - set(inspect.signature(REPLACED[place]).parameters) - {"cls", "self"}
    assert not new, f"megatron-core {megatron.version} changed {place}: new parameters {sorted(new)}"


@every_version
@pytest.mark.parametrize("place", CHANGED)
def test_signatures_that_differ_between_versions(place: str, megatron: Upstream) -> None:
    expected = set(due(CHANGED[place], megatron.version).split()) - {"self", "cls"}
    found = megatron.names_of(place) - {"self", "cls"}
    assert found == expected, f"megatron-core {megatron.version} changed {place}: {sorted(found ^ expected)}"


@every_version
@pytest.mark.parametrize("place", REBOUND)
def test_names_that_install_rebinds(place: str, megatron: Upstream) -> None:
    assert megatron.has(place), f"megatron-core {megatron.version} has no {place}"
    own = "LocalSpecProvider()" if "LocalSpecProvider" in place else place.split(":")[1]
    if isinstance(megatron, Tree) and not place.startswith("megatron.core.models.backends"):
        file = megatron.file(place.split(":")[0])
        assert file is not None
        uses = re.findall(rf"\b{re.escape(own)}", file.read_text())
        assert uses, f"megatron-core {megatron.version}: {place} is bound, but nothing there uses it"


@every_tree
@pytest.mark.parametrize("place", TRAINING)
def test_the_training_package(place: str, megatron: Tree) -> None:
    expected = due(TRAINING[place], megatron.version)
    assert megatron.has(place) == bool(expected), f"Megatron-LM {megatron.version} changed {place}"
    if expected:
        missing = set(expected.split()) - megatron.names_of(place)
        assert not missing, f"Megatron-LM {megatron.version} changed {place}: it no longer has {sorted(missing)}"


@every_tree
def test_the_arguments_of_the_training_package(megatron: Tree) -> None:
    text = "".join(file.read_text() for file in sorted((megatron.root / "megatron/training").glob("*.py")))
    for name in ARGUMENTS.split():
        assert re.search(rf"\bargs\.{name}\b", text), f"Megatron-LM {megatron.version} has no args.{name}"
    for module, name in MODEL_BUILDERS.items():
        assert f"{module}:{name}" in TRAINING


def test_the_provider_is_complete() -> None:
    asked = set(upstream.BackendSpecProvider.__abstractmethods__)  # type: ignore[attr-defined]
    known = {place.rsplit(".", 1)[1] for place in REPLACED if "BackendSpecProvider" in place}
    assert asked == known, f"megatron-core {MEGATRON_VERSION} changed BackendSpecProvider: {sorted(asked ^ known)}"
    assert issubclass(StockSpecProvider, Fp4SpecProvider)
    for norm in (RMSNorm, LayerNorm):
        assert norm.returns_residual is False


@every_version
@pytest.mark.parametrize("name", ["ColumnParallelLinear", "RowParallelLinear"])
def test_forward_impl_is_called_with_keywords(name: str, megatron: Upstream) -> None:
    """Our linears read these keywords; a positional argument would be lost."""
    tree = megatron.tree_of(f"{LAYERS}:{name}.forward")
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "self._forward_impl"]
    assert len(calls) == 1, f"megatron-core {megatron.version} changed {name}.forward: {len(calls)} _forward_impl calls"
    expected = {"input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"}
    missing = (expected | {"tp_group"}) - {keyword.arg for keyword in calls[0].keywords}
    assert not missing, f"megatron-core {megatron.version} calls {name}._forward_impl without {sorted(missing)}"
    assert not calls[0].args, f"megatron-core {megatron.version} calls {name}._forward_impl with positional arguments"


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
