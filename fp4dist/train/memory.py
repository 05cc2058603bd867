"""How much memory a run needs on one rank, from its configuration alone: for dry runs and for out-of-memory errors.

A model of the large buffers, not of everything: the allocator's fragments, kernels' workspaces and NCCL's buffers come
on top (1 to 3 GB on a GPU), and FP4 codes kept for backward make the activations smaller than said here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from fp4dist.megatron.coded_bucket import why_whole
from fp4dist.megatron.sites import count_parameters, gpt_sites
from fp4dist.nn.assign import assign
from fp4dist.nn.sites import LinearSite
from fp4dist.spec.blocks import Ema
from fp4dist.spec.recipe import BLOCK_ROLES
from fp4dist.spec.run import ModelConfig, RunConfig

_FP32, _PLACE = 4, 8  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank (the fullest pipeline stage).

    parameters    number of parameters that this rank holds
    codes         what engine.fp4_param_gather keeps beside the weights: half a byte an element and one a block
    controls      what the recipe keeps for each element of quantized weights: averages, open windows
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    codes: int = 0
    controls: int = 0

    @property
    def total(self) -> int:
        """All buffers."""
        return sum(size for _, size in self.largest())

    def table(self) -> str:
        """One line a buffer, the largest first."""
        return "\n".join(
            f"  {name:<12} {readable(size):>10}" for name, size in [*self.largest(), ("total", self.total)]
        )

    def largest(self) -> list[tuple[str, int]]:
        """(buffer, bytes), the largest first."""
        names = ["weights", "gradients", "optimizer", "activations", "logits"]
        names += [name for name in ("codes", "controls") if getattr(self, name)]
        return sorted(((n, getattr(self, n)) for n in names), key=lambda item: -item[1])


def readable(size: int) -> str:
    """Bytes for people: 312 MiB, 4.25 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def estimate(config: RunConfig, dp: int, *, element: int) -> MemoryEstimate:
    """The estimate for `dp` data-parallel ranks.

    element   bytes of one weight or activation: 2 for bf16, 4 for fp32
    """
    dense, experts = _parameters_per_rank(config)
    p, count = config.parallel, dense + experts
    per_stage = p.tp * p.cp * dp
    expert_copies = max(1, per_stage // p.ep)  # experts are not cut by tp
    weights, gradients, optimizer = (
        a + b
        for a, b in zip(
            _states(config, dense, dp * p.cp, element),
            _states(config, experts, expert_copies, element),
            strict=True,
        )
    )
    return MemoryEstimate(
        parameters=count,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(config, element),
        logits=_logits(config, element),
        codes=_codes(config, dp * p.cp, expert_copies) if config.engine.fp4_param_gather else 0,
        controls=_controls(config, dp * p.cp, expert_copies) if config.recipe.watches_weights else 0,
    )


def _parameters_per_rank(config: RunConfig) -> tuple[int, int]:
    """(others, those of experts) on the fullest stage: its share of the blocks, and embedding or head (both without a
    pipeline).
    """
    model, p = config.model, config.parallel
    sizes = dict.fromkeys(("blocks", "expert", "router"), 0)
    for s in gpt_sites(model):
        key = s.role if s.role in sizes else "blocks" if s.role in BLOCK_ROLES else None
        if key is not None:
            sizes[key] += s.in_features * s.out_features
    table = model.vocab_size * model.hidden_size
    tables = count_parameters(model) - sum(sizes.values()) - _norms(model)
    ends = table if p.pp > 1 else tables
    whole = sizes["router"] + _norms(model)
    return sizes["blocks"] // (p.tp * p.pp) + ends // p.tp + whole // p.pp, sizes["expert"] // (p.ep * p.pp)


def _norms(model: ModelConfig) -> int:
    width = model.hidden_size * (2 * model.num_layers + 1)
    return width + (2 * model.num_layers * model.kv_channels if model.qk_norm else 0)


def _states(config: RunConfig, count: int, dp: int, element: int) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer) of `count` parameters that `dp` ranks hold alike.

    Optimizer: two fp32 moments (SGD has one, Adafactor's are rows and columns), and an fp32 master copy where the
    weights are not fp32 themselves.
    Megatron: gradients in one fp32 buffer, AdamW's state cut over data-parallel ranks, SGD's whole.
    DeepSpeed: ZeRO 1 cuts the optimizer state, 2 also the gradients, 3 also the weights; gradients are fp32 as well.
    """
    kept = {"adamw": 2, "sgd": int(config.optim.momentum > 0), "adafactor": 0}[config.optim.kind]
    moments = kept * _FP32 * count + (_FP32 * count if element < _FP32 else 0)
    if config.engine.kind == "megatron":
        return element * count, _FP32 * count, moments // (dp if config.optim.kind == "adamw" else 1)
    stage = config.engine.zero_stage
    return (
        element * count // (dp if stage == 3 else 1),
        _FP32 * count // (dp if stage >= 2 else 1),
        moments // (dp if stage >= 1 else 1),
    )


def _codes(config: RunConfig, copies: int, expert_copies: int) -> int:
    """Bytes of the weights that ranks with equal parts of the model know of each other as codes."""
    total = 0.0
    for row in assign(gpt_sites(config.model), config.recipe).rows:
        recipe, is_expert = config.recipe.linear(row.linear), row.site.role == "expert"
        spec = recipe.fprop.w
        if spec is None or why_whole(recipe) is not None or (expert_copies if is_expert else copies) == 1:
            continue
        total += _elements(config, row.site) * (1 / 2 + 1 / prod(spec.shape))
    return int(total)


def _elements(config: RunConfig, site: LinearSite) -> float:
    """Elements of a linear's weight on one rank, with a pipeline the mean over its stages."""
    p = config.parallel
    ranks = p.pp * (p.ep if site.role == "expert" else p.tp) if site.role in BLOCK_ROLES else p.tp
    return site.in_features * site.out_features / ranks


def _controls(config: RunConfig, copies: int, expert_copies: int) -> int:
    """Bytes of moving averages, which are whole on every rank, and of open windows, which lie with the optimizer: w,
    Q(w) and the ways of both, and the place where not every element is watched.
    """
    cut, total = config.engine.kind == "megatron", 0.0
    for row in assign(gpt_sites(config.model), config.recipe).rows:
        spec = config.recipe.linear(row.linear).fprop.w
        if spec is None:
            continue
        elements = _elements(config, row.site)
        pieces = (expert_copies if row.site.role == "expert" else copies) if cut else 1
        total += _FP32 * elements if isinstance(spec.rounding, Ema) else 0
        for control in config.recipe.weights:
            share = {"osci_reset": getattr(control, "share", 1.0), "q_ramping": 1.0}.get(control.kind, 0.0)
            total += share * (4 * _FP32 + (_PLACE if share < 1 else 0)) * elements / pieces
    return int(total)


def _activations(config: RunConfig, element: int) -> int:
    """What the layers keep for backward, in elements of the model's precision:

    whole hidden width       both norms' inputs and outputs                                4 h
    tensor-parallel width    q, k, v, the attention's output, fc1's two outputs, fc2's input  2 q + 2 kv + 3 f
    experts, top_k a token   their input, fc1's two outputs, fc2's input                      h + 3 f

    Full recomputation keeps the input of each layer, and all of this of one; of selective recomputation `mlp` counts.
    The first stage of a pipeline holds up to pp micro-batches at once, interleaved (pp - 1) / vpp more.
    """
    m, p, t = config.model, config.parallel, config.train
    layer = [_kept(config, number) for number in range(m.num_layers)]
    stage = sum(layer) / p.pp
    if t.recompute == "full":
        stage = m.num_layers / p.pp * m.hidden_size / (p.tp if p.sequence_parallel else 1)
    tokens = t.micro_batch_size * m.seq_length / p.cp
    in_flight = min(p.pp + ((p.pp - 1) / p.vpp if p.vpp > 1 else 0), t.global_batch_size // t.micro_batch_size)
    return int(element * tokens * (stage * in_flight + (max(layer) if t.recompute == "full" else 0)))


def _kept(config: RunConfig, layer: int) -> float:
    """Elements that one layer keeps for each token of a micro-batch."""
    m, p, t = config.model, config.parallel, config.train
    spread = p.tp if p.sequence_parallel else 1
    again = set(t.recompute_modules) if t.recompute == "selective" else set()
    kept = 4 * m.hidden_size / spread + (2 * m.num_attention_heads + 2 * m.query_groups) * m.kv_channels / p.tp
    if m.moe is None or layer < m.moe.first_dense_layers:
        return kept + (0 if "mlp" in again else 3 * m.ffn_hidden_size / p.tp)
    routed = m.moe.top_k * (m.hidden_size + 3 * m.moe.ffn_hidden_size) / spread
    shared = 3 * m.moe.shared_ffn_hidden_size / p.tp
    return kept + (0 if "moe" in again else routed + (0 if "shared_experts" in again else shared))


def _logits(config: RunConfig, element: int) -> int:
    """Logits in the model's precision, their fp32 copy, and the gradient of the loss."""
    tokens = config.train.micro_batch_size * config.model.seq_length / config.parallel.cp
    width = 2 * element + _FP32 if element < _FP32 else 2 * _FP32
    return int(tokens * config.model.vocab_size / config.parallel.tp * width)
