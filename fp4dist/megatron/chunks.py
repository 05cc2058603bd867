"""A recipe on the chunks that Megatron built: wrapped or not, one pipeline stage of many, any parallel layout.

Rules such as "the last 15 % of the layers" and the noise numbers need the whole model. Each rank knows its own layers,
with their global numbers; the lists are exchanged over the expert- and the pipeline-parallel group, so that any layout
(uneven stages, standalone embeddings, experts in some layers) comes out as Megatron built it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from fp4dist.errors import ConfigError, RecipeMismatch
from fp4dist.megatron.stamp import RecipeStamp
from fp4dist.megatron.upstream import TransformerConfig, parallel_state, refuse_fp4_switch
from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.sites import LinearSite, find_linears
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.run import BackendConfig

log = logging.getLogger("fp4dist")


def apply(
    chunks: nn.Module | Sequence[nn.Module],
    recipe: Recipe | str | Path,
    *,
    seed: int = 0,
    backend: BackendConfig | None = None,
    tokens: int | None = None,
    allow_recipe_change: bool = False,
) -> AppliedRecipe:
    """Make the GPTModel chunks of this rank run under `recipe`. A collective call: every rank of the model makes it.

    chunks               GPTModels built with our provider, bare or inside Float16Module and Megatron's DDP; with
                         virtual pipeline stages all chunks of the rank, in order
    tokens               micro-batch size * sequence length of one context-parallel rank, to check sizes now
    allow_recipe_change  load checkpoints of another recipe
    returns              call its set_step(step, total) before every step. Micro-batches are counted by hooks on the
                         chunks: their forward calls in training mode since the last set_step
    raises               RecipeMismatch, ConfigError for a setting under which FP4 would silently be lost or wrong
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    refuse_unserved(recipe)
    models = [unwrap(chunk) for chunk in ([chunks] if isinstance(chunks, nn.Module) else chunks)]
    for model in models:
        check_config(getattr(model, "config", None), recipe)
    offsets = [layer_offset(model) for model in models]
    applied = apply_recipe(
        models,
        recipe,
        seed=seed,
        backend=backend,
        sites=whole_model(models, offsets),
        layer_offset=offsets,
        tokens=tokens,
        data_parallel=data_parallel(),
    )
    stamp = RecipeStamp.of(recipe, allow_recipe_change)
    for target in applied.targets:
        if hasattr(target.module, "stamp"):
            target.module.stamp = stamp  # type: ignore[attr-defined]
    MicroBatches(applied).attach(models)
    return applied


@dataclass(slots=True)
class MicroBatches:
    """Keeps an AppliedRecipe's clock at the global micro-batch index while chunks run forward.

    index = i * data_parallel_size + data_parallel_rank, where i counts a chunk's forward calls in training mode since
    the step began. Evaluation does not count; its noise is that of micro-batch 0 of the last step.
    enter    called before each training forward; may move the clock to another step
    number   micro-batches a step, if known: a step that is run again then draws the same noise
    """

    applied: AppliedRecipe
    enter: Callable[[], None] | None = None
    number: Callable[[], int] | None = None
    _step: int | None = None
    _counts: dict[int, int] = field(default_factory=dict)

    def attach(self, models: Iterable[nn.Module]) -> None:
        """Put the hook on every chunk; one that an earlier recipe has put there goes."""
        for i, model in enumerate(models):
            earlier = getattr(model, "_fp4dist_micro_batches", None)
            if earlier is not None:
                earlier.remove()
            handle = model.register_forward_pre_hook(self._hook(i))
            object.__setattr__(model, "_fp4dist_micro_batches", handle)

    def _hook(self, chunk: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, _: self._before(chunk, module)

    def _before(self, chunk: int, module: nn.Module) -> None:
        if not module.training:
            self.applied.set_micro_batch(0)
            return
        if self.enter is not None:
            self.enter()
        if self.applied.clock.step != self._step:
            self._step = self.applied.clock.step
            self._counts.clear()
        i = self._counts.get(chunk, 0)
        self._counts[chunk] = i + 1
        if self.number is not None:
            i %= self.number()
        self.applied.set_micro_batch(i)


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside Megatron's DDP and Float16Module."""
    while isinstance(inner := getattr(module, "module", None), nn.Module):
        module = inner
    return module


def data_parallel() -> tuple[int, int]:
    """Rank and size of this process's data-parallel group; ranks that share a batch by context parallelism are one."""
    if not parallel_state.is_initialized():
        return 0, 1
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def layer_offset(model: nn.Module) -> int:
    """Global number, from 0, of the first layer of a GPTModel's chunk; 0 for a chunk without layers."""
    layers: Any = getattr(getattr(model, "decoder", None), "layers", None)
    if layers is None:
        raise RecipeMismatch(
            f"a {type(model).__name__} has no decoder.layers: fp4dist.megatron.apply takes GPTModels (or their"
            " wrappers); use fp4dist.apply_recipe for other modules"
        )
    numbers = [layer.layer_number - 1 for layer in layers]
    if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ConfigError(f"pipeline_model_parallel_layout: a chunk holds layers {numbers}, which are not consecutive")
    return numbers[0] if numbers else 0


def whole_model(models: Sequence[nn.Module], offsets: Sequence[int]) -> list[LinearSite]:
    """Every linear of the model over all pipeline stages and expert ranks, layer by layer, then the head."""
    found = [site for model, offset in zip(models, offsets, strict=True) for site, *_ in find_linears(model, offset)]
    known = {site.path for site in found}
    found += [site for model in models if (site := _head(model)) is not None and site.path not in known]
    if parallel_state.is_initialized():
        found = _gathered(found, parallel_state.get_expert_model_parallel_group(check_initialized=False))
        found = _gathered(found, parallel_state.get_pipeline_model_parallel_group())
    if not any(site.path != "output_layer" for site in found):
        raise RecipeMismatch(
            "the model has none of fp4dist's linears: build it after fp4dist.megatron.install(...) with"
            " --transformer-impl local, or with our provider or spec"
        )
    last = 1 + max((site.layer for site in found if site.layer is not None), default=0)
    return sorted(found, key=lambda site: last if site.layer is None else site.layer)  # stable: order inside a layer


def refuse_unserved(recipe: Recipe) -> None:
    """RecipeMismatch for a recipe of which Megatron-LM's own loop would lose a part.

    It neither updates nor saves what a recipe keeps from step to step, and its learning rate knows no phases.
    """
    rates = [f"phases.{phase.name}.lr" for phase in recipe.phases if phase.enabled and phase.lr is not None]
    for parts, lost in ((recipe.kept_state, "keeps state from step to step"), (rates, "sets the learning rate")):
        if parts:
            raise RecipeMismatch(
                f"recipe {recipe.name} {lost} ({', '.join(parts)}), and the loop around this model, Megatron-LM's or"
                " one's own, neither does that nor has it in its checkpoints: train with fp4dist's loop"
                " (launch/pretrain.py with engine.kind: megatron), or use a recipe without it"
            )


def check_config(config: TransformerConfig | None, recipe: Recipe) -> None:
    """Refuse settings under which FP4 or its noise would silently be wrong; ConfigError."""
    if config is None:
        return
    refuse_fp4_switch(config)
    if not recipe.wants_fp4:
        return
    if getattr(config, "fp8", None):
        raise ConfigError(
            f"fp8 = {config.fp8!r} (--fp8-format): Megatron-core hands it to Transformer Engine's linears, which this"
            " model does not have, and recomputes through TE's checkpoint, where the rounding noise would differ from"
            " the first run's; leave it out"
        )
    graphs = getattr(config, "cuda_graph_impl", "none")
    if graphs not in (None, "none") or getattr(config, "enable_cuda_graph", False):
        raise ConfigError(
            f"cuda_graph_impl = {graphs!r}: a captured graph would replay the same rounding noise in every step;"
            " turn CUDA graphs off"
        )
    if getattr(config, "mtp_num_layers", None):
        raise ConfigError(
            f"mtp_num_layers = {config.mtp_num_layers}: layers of multi-token prediction have no global number that a"
            " rule could name; leave --mtp-num-layers out"
        )
    if getattr(config, "overlap_moe_expert_parallel_comm", False):
        raise ConfigError(
            "overlap_moe_expert_parallel_comm = True runs layers of two micro-batches in turn, which fp4dist's noise"
            " clock does not follow; set it to False"
        )


def _head(model: nn.Module) -> LinearSite | None:
    """Megatron's own output layer, so that a rule for heads is answered; its class cannot run FP4."""
    head: Any = getattr(model, "output_layer", None)
    if head is None:
        return None
    return LinearSite(
        path="output_layer", role="head", layer=None, in_features=head.input_size, out_features=head.output_size
    )


def _gathered(sites: list[LinearSite], group: Any) -> list[LinearSite]:
    """The union over a group, each path once, in order of the ranks."""
    if group is None or dist.get_world_size(group) == 1:
        return sites
    lists: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(lists, sites, group=group)
    return list({site.path: site for part in lists for site in part}.values())
