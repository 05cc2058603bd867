"""A Llama-style GPTModel made of Megatron-core's parts, with fp4dist's linears, norm and attention.

`Fp4SpecProvider` is Megatron's own seam for this (BackendSpecProvider); `block_spec` puts its classes into a whole
TransformerBlock, because a block that is given only a layer spec chooses its final norm itself, and that choice
refuses sequence parallelism. Runs on megatron-core 0.16 to 0.20.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fp4dist.errors import ConfigError
from fp4dist.megatron import fusions
from fp4dist.megatron.attention import core_attention
from fp4dist.megatron.fusions import FusedResidualRMSNorm, FusedRMSNorm, FusedRopeAttention, Fusions, fused_loss
from fp4dist.megatron.initialize import initialize_weights, keep_values
from fp4dist.megatron.norm import Norm
from fp4dist.megatron.producers import HandingResidualRMSNorm, HandingRMSNorm, take_over_mlps
from fp4dist.megatron.recompute import keep_clock_on_replay
from fp4dist.megatron.upstream import (
    MEGATRON_VERSION,
    AttnMaskType,
    BackendSpecProvider,
    ColumnParallelLinear,
    GPTModel,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    SelfAttention,
    SelfAttentionSubmodules,
    SequentialMLP,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_cuda_rng_tracker,
    get_mlp_module_spec_for_backend,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    model_parallel_cuda_manual_seed,
    parallel_state,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    tensor_parallel,
    without_known_warnings,
)
from fp4dist.spec.run import ModelConfig, MoeConfig, ParallelConfig, RunConfig

Linears = Literal["fp4dist", "megatron"]

log = logging.getLogger("fp4dist")


class Fp4SpecProvider(BackendSpecProvider):
    """Which class Megatron's spec builders use for each part of a layer.

    linears  "fp4dist": linears that apply_recipe can set to FP4; "megatron": Megatron's own, to compare with
    fused    of these the norm and RoPE are this provider's affair
    """

    def __init__(self, linears: Linears = "fp4dist", fused: Fusions = fusions.NONE) -> None:
        self.column, self.row = _linear_classes(linears)
        self.fused = fused

    def column_parallel_linear(self) -> type:
        """For qkv, fc1."""
        return self.column

    def row_parallel_linear(self) -> type:
        """For proj, fc2."""
        return self.row

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and linear stay apart: the linear quantizes the norm's output."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """No such class, see fuse_layernorm_and_linear."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """RMSNorm or LayerNorm, whatever the config says; `has_residual` came with 0.17."""
        if not (self.fused.norm and rms_norm):
            return Norm
        return HandingRMSNorm if self.fused.amax and not for_qk else FusedRMSNorm

    def residual_norm(self) -> type:
        """The norm at the beginning of a residual branch."""
        if not self.fused.norm or MEGATRON_VERSION < (0, 17):
            return self.layer_norm(rms_norm=True)
        return HandingResidualRMSNorm if self.fused.amax else FusedResidualRMSNorm

    def self_attention(self) -> type:
        """The module around core attention; Megatron's builders do not ask for it."""
        return FusedRopeAttention if self.fused.rope else SelfAttention

    def core_attention(self) -> type:
        """Transformer Engine's attention or torch's."""
        return core_attention()

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False) -> Any:
        """Experts in one grouped GEMM or one after the other; 0.16 wants a pair, later versions a builder."""
        experts, submodules = self._experts(moe_use_grouped_gemm or moe_use_legacy_grouped_gemm)
        if MEGATRON_VERSION < (0, 17):
            return experts, submodules
        return partial(experts, submodules=submodules)

    def _experts(self, grouped: bool) -> tuple[type, MLPSubmodules]:
        if self.column is ColumnParallelLinear:  # Megatron's own have no grouped form without Transformer Engine
            return SequentialMLP, MLPSubmodules(linear_fc1=self.column, linear_fc2=self.row)
        from fp4dist.megatron import experts

        if not grouped:
            submodules = MLPSubmodules(linear_fc1=experts.ExpertColumn, linear_fc2=experts.ExpertRow)
            return experts.Fp4SequentialExperts, submodules
        submodules = MLPSubmodules(linear_fc1=experts.GroupedColumn, linear_fc2=experts.GroupedRow)
        return experts.Fp4GroupedExperts, submodules

    def activation_func(self) -> Any:
        """No module: config.activation_func is called."""
        return None


class Fp4GPTModel(GPTModel):
    """GPTModel with a head of class `head_class`, so that a rule can reach it; Megatron hard-codes its own class.

    fused   of these the loss is the model's affair
    """

    def __init__(self, *args: Any, head_class: type, fused: Fusions = fusions.NONE, **kwargs: Any) -> None:
        self._head_class = head_class  # before the constructor, which needs it
        self._fused_loss = fused.loss
        super().__init__(*args, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of each token, fp32 [B, S], of labels [B, S] and logits [S, B, V / tp]."""
        if not self._fused_loss:
            return super().compute_language_model_loss(labels, logits)
        return fused_loss(logits, labels, parallel_state.get_tensor_model_parallel_group())

    def setup_embeddings_and_output_layer(self) -> None:
        """Called by GPTModel's constructor once the head exists: exchange it before anything refers to its weight."""
        if self.post_process:
            head = self.output_layer
            self.output_layer = self._head_class(
                head.input_size,
                head.output_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=head.gather_output,
                skip_weight_param_allocation=head.weight is None,
                tp_group=head.tp_group,
            )
        super().setup_embeddings_and_output_layer()


def transformer_config(config: RunConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the model and its parallelism.

    dtype    torch.bfloat16 or torch.float32, of parameters and activations
    returns  no biases and no dropout. Of Megatron's fusions those that need neither Transformer Engine nor apex,
             SwiGLU and cross-entropy, follow `fusions.choose`
    raises   ConfigError
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"train.dtype = {dtype}: parameters must be bf16 or fp32")
    model, parallel = config.model, config.parallel
    if model.kv_channels % 2:
        raise ConfigError(f"model.head_dim = {model.kv_channels} must be even: RoPE rotates pairs")
    gpu = torch.cuda.is_available()
    fused = fusions.choose(config)
    settings: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        init_method=keep_values,  # initialize_weights fills them
        output_layer_init_method=keep_values,
        use_cpu_initialization=not gpu,  # where the memory is allocated
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        # two stages would exchange two tensors at once in a batch, between the same two ranks
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        account_for_embedding_in_pipeline_split=parallel.ends_as_layers,
        account_for_loss_in_pipeline_split=parallel.ends_as_layers,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.sequence_parallel,
        # the interleaved schedule frees an output whose sending it has not waited for: over gloo, garbage would arrive
        deallocate_pipeline_outputs=parallel.pp > 1 and parallel.vpp == 1,
        gradient_accumulation_fusion=False,  # needs apex; our linears add to main_grad themselves
        bias_activation_fusion=fused.swiglu,
        cross_entropy_loss_fusion=fused.loss,
        deterministic_mode=config.train.deterministic,
        cross_entropy_fusion_impl="native",
        bias_dropout_fusion=False,  # without bias and dropout nothing is left to fuse
        apply_rope_fusion=False,  # needs Transformer Engine; ours does not
    )
    settings |= _recompute_settings(config)
    if model.moe is not None:
        settings |= _moe_settings(model, model.moe, parallel)
    with without_known_warnings():
        return TransformerConfig(**settings)


def _recompute_settings(config: RunConfig) -> dict[str, Any]:
    """Megatron's words for train.recompute."""
    kind, modules = config.train.recompute, config.train.recompute_modules
    if kind == "none":
        return {}
    if kind == "full":  # the input of each layer is kept, nothing else
        return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    of_experts = ("moe", "moe_act", "shared_experts")
    known = ("core_attn", "layernorm", "mlp", *(of_experts if config.model.moe is not None else ()))
    if not modules or not set(modules) <= set(known):
        raise ConfigError(
            f"train.recompute_modules = {list(modules)}: must be some of {', '.join(known)}"
            f"{'' if config.model.moe is not None else ' in a model without experts'}"
        )
    needs_te = sorted({"layernorm", "moe_act"} & set(modules))
    if needs_te and not tensor_parallel.random.HAVE_TE:
        raise ConfigError(
            f"train.recompute_modules names {', '.join(needs_te)}: Megatron-core recomputes that only with"
            " Transformer Engine, which is not installed; leave it out"
        )
    return dict(recompute_granularity="selective", recompute_modules=list(modules))


def _moe_settings(model: ModelConfig, moe: MoeConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Megatron's words for model.moe. Experts are never cut by tensor parallelism: they are many and small."""
    if parallel.tp > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"parallel.tp = {parallel.tp} with model.moe needs parallel.sequence_parallel: true; without it every"
            " tensor-parallel rank would send the same tokens to the experts"
        )
    return dict(
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_router_pre_softmax=moe.top_k == 1,  # softmax over one chosen expert would be the constant 1
        moe_ffn_hidden_size=moe.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None,
        moe_layer_freq=[int(layer >= moe.first_dense_layers) for layer in range(model.num_layers)],
        moe_router_load_balancing_type="aux_loss" if moe.aux_loss_coeff else "none",
        moe_aux_loss_coeff=moe.aux_loss_coeff,
        moe_router_dtype="fp32" if moe.router_dtype == "fp32" else None,
        moe_token_dispatcher_type=moe.dispatcher,
        moe_grouped_gemm=moe.grouped_gemm,
    )


def layer_spec(config: TransformerConfig, provider: Fp4SpecProvider, *, experts: bool = False) -> ModuleSpec:
    """One transformer layer of the provider's parts, with the checkpoint keys of Megatron's own GPT layers.

    experts   a mixture of experts (config.num_moe_experts) takes the place of the MLP
    """
    mlp: Any = get_mlp_module_spec_for_backend(
        backend=provider,
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )
    return transformer_layer(
        provider, mlp, qk_norm=config.qk_layernorm, dense=not experts, attention=provider.self_attention()
    )


def transformer_layer(
    provider: Fp4SpecProvider, mlp: Any, *, qk_norm: bool, dense: bool = True, attention: type = SelfAttention
) -> ModuleSpec:
    """A layer around the spec `mlp`; `dense` says that it is an MLP and no mixture of experts."""
    # the norm belongs to fc1 in Megatron's keys, but before experts it stands for itself
    fused_norm = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if dense else {}
    query_key_norm = provider.layer_norm(rms_norm=True, for_qk=True) if qk_norm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.residual_norm(),
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=provider.column_parallel_linear(),
                    core_attention=provider.core_attention(),
                    linear_proj=provider.row_parallel_linear(),
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=cast(type, get_bias_dropout_add),  # a function here, as in Megatron's own specs
            pre_mlp_layernorm=provider.residual_norm(),
            mlp=mlp,
            mlp_bda=cast(type, get_bias_dropout_add),
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                **fused_norm,
            },
        ),
    )


def block_spec(
    config: TransformerConfig,
    *,
    linears: Linears = "fp4dist",
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    fused: Fusions = fusions.NONE,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm; pp_rank None means this process's."""
    provider = Fp4SpecProvider(linears, fused)
    specs = {experts: layer_spec(config, provider, experts=experts) for experts in set(_has_experts(config))}
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    final_norm: Any = provider.layer_norm(rms_norm=True)
    layers = [specs[experts] for experts in _has_experts(config)[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _has_experts(config: TransformerConfig) -> list[bool]:
    """For each layer of the whole model; Megatron's moe_layer_freq is a list of 0 and 1, or n: every n-th layer."""
    layers, every = config.num_layers, config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * layers
    if isinstance(every, int):
        return [layer % every == 0 for layer in range(layers)]
    return [bool(experts) for experts in every]


def build_gpt(
    config: RunConfig,
    dtype: torch.dtype,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    linears: Linears = "fp4dist",
    megatron: TransformerConfig | None = None,
) -> GPTModel:
    """One pipeline stage of the model, on this process's device, with its initial weights.

    Megatron's process groups must exist (parallel_state.initialize_model_parallel). On a GPU Megatron's RNG tracker is
    seeded with run.seed unless the caller has done so. `megatron`: its configuration, where several chunks share it.

    model(tokens, position_ids, attention_mask, labels=labels): tokens, position_ids, labels int64 [B, S],
    attention_mask None for causal training; the result is the loss of each token, fp32 [B, S]. Without labels: logits
    [B, S, padded vocabulary / tp].
    """
    tracker: Any = get_cuda_rng_tracker()
    if torch.cuda.is_available() and not tracker.is_initialized():
        model_parallel_cuda_manual_seed(config.run.seed)
    megatron = megatron or transformer_config(config, dtype)
    if config.train.recompute != "none":
        keep_clock_on_replay()
    fused = fusions.choose(config)
    log.info("fusions by torch.compile: %s", fused.describe())
    spec: Any = block_spec(megatron, linears=linears, vp_stage=vp_stage, fused=fused)
    ours = partial(Fp4GPTModel, head_class=_linear_classes(linears)[0], fused=fused)
    model_class = GPTModel if linears == "megatron" else ours
    model = model_class(
        config=megatron,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(config),
        max_sequence_length=config.model.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_base,
        vp_stage=vp_stage,
    )
    if fused.amax:
        take_over_mlps(model)
    initialize_weights(model, config)
    for name, parameter in model.named_parameters():
        # gradient norms and DeepSpeed ask every parameter whether it is sharded
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if ".local_experts." in name and config.parallel.tp > 1:
            # ranks of a tensor-parallel group hold copies that see other tokens: reduced over the expert-data-parallel
            # group. Megatron-core 0.16 marks only expert-parallel weights so.
            setattr(parameter, "allreduce", False)  # noqa: B010 - a mark on a tensor
    return model


def build_chunks(config: RunConfig, dtype: torch.dtype, *, linears: Linears = "fp4dist") -> list[GPTModel]:
    """This rank's part of the model, in the order of its layers: one GPTModel, or parallel.vpp of them.

    They share one TransformerConfig, in which engines put the callbacks that the schedules look for. See build_gpt.
    """
    megatron = transformer_config(config, dtype)
    interleaved = config.parallel.vpp > 1
    chunks = []
    for stage in range(config.parallel.vpp):
        vp_stage = stage if interleaved else None
        chunks.append(
            build_gpt(
                config,
                dtype,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
                linears=linears,
                megatron=megatron,
            )
        )
    return chunks


def padded_vocab_size(config: RunConfig) -> int:
    """model.vocab_size, rounded up to a multiple of parallel.tp; rounding is logged. No label names a padded row."""
    vocab, tp = config.model.vocab_size, config.parallel.tp
    padded = -(-vocab // tp) * tp
    if padded != vocab:
        log.info("model.vocab_size = %d is padded to %d, a multiple of parallel.tp = %d", vocab, padded, tp)
    return padded


def tp_partial_parameters(model: GPTModel) -> list[tuple[str, nn.Parameter]]:
    """Replicated parameters whose gradient on one tensor-parallel rank is only a part of the sum over the ranks.

    Norms, routers and experts under sequence parallelism (each rank has a part of the tokens) and query/key norms (a
    part of the heads). Megatron's finalize_model_grads adds these up by itself, and the experts' its reduction over
    expert data parallelism; an engine that has neither has to.
    """
    if model.config.tensor_model_parallel_size == 1:
        return []
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if (model.config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        or "q_layernorm" in name
        or "k_layernorm" in name
        or ".local_experts." in name
    ]


def _linear_classes(linears: Linears) -> tuple[type, type]:
    """Column- and row-parallel linear."""
    if linears == "megatron":
        return ColumnParallelLinear, RowParallelLinear
    from fp4dist.megatron.layers import Fp4ColumnParallelLinear, Fp4RowParallelLinear

    return Fp4ColumnParallelLinear, Fp4RowParallelLinear
