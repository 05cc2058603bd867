"""One line before an unchanged Megatron-LM script: its `--transformer-impl local` model then trains in FP4.

    import fp4dist.megatron; fp4dist.megatron.install("nvidia_nvfp4")

or, with the script itself untouched, `torchrun ... -m fp4dist.megatron --recipe nvidia_nvfp4 pretrain_gpt.py ARGS`.
Megatron-LM has no registry for what is exchanged here, so names in its modules are bound anew; each is logged.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import nn

from fp4dist import env
from fp4dist.errors import ConfigError, DependencyError, RecipeMismatch
from fp4dist.megatron.attention import SdpaAttention
from fp4dist.megatron.chunks import MicroBatches, apply, refuse_unserved, unwrap
from fp4dist.megatron.masks import CausalMasks
from fp4dist.megatron.norm import fused_norm
from fp4dist.megatron.recompute import keep_clock_on_replay
from fp4dist.megatron.stock import StockSpecProvider
from fp4dist.megatron.upstream import GPTModel, parallel_state
from fp4dist.nn.apply import AppliedRecipe
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.run import BackendConfig

log = logging.getLogger("fp4dist")

# module -> the names in it that choose a layer's parts; 0.16 to 0.20 have all of them
PROVIDERS = (
    "megatron.core.models.backends",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.moe_module_specs",
)
FINAL_NORMS = {
    "megatron.core.transformer.transformer_block": "LayerNormImpl",
    "megatron.core.models.gpt.gpt_layer_specs": "LNImpl",
}
# functions of Megatron-LM that return a rank's model chunks; the second came with 0.20's configuration containers
MODEL_BUILDERS = {
    "megatron.training.training": "get_model",
    "megatron.training.models.gpt": "unimodal_build_distributed_models",
}


@dataclass(slots=True)
class Installation:
    """What install() did.

    rebound    "module.name" of everything in Megatron that is ours now
    applied    one AppliedRecipe for each model that Megatron-LM has built
    """

    recipe: Recipe
    seed: int | None
    backend: BackendConfig | None
    allow_recipe_change: bool
    keep_masks: bool
    rebound: list[str] = field(default_factory=list)
    applied: list[AppliedRecipe] = field(default_factory=list)


_installed: Installation | None = None


def install(
    recipe: Recipe | str | Path,
    *,
    seed: int | None = None,
    backend: BackendConfig | None = None,
    allow_recipe_change: bool = False,
    keep_masks: bool = False,
) -> Installation:
    """Make stock GPT models of Megatron-core from now on with our linears, norms and attention, and under `recipe`.

    With Megatron-LM (`megatron.training`) the recipe is applied to every model it builds and its noise follows the
    iteration. Without it (one's own loop over Megatron-core) build the model, then call fp4dist.megatron.apply.
    Recipe "bf16" exchanges norms and attention only: the provider alone.

    seed                 of the rounding noise; None takes Megatron-LM's --seed
    allow_recipe_change  load checkpoints of another recipe
    keep_masks           pass the dataloader's attention masks on even where they are plainly causal
    returns              the Installation; a second call with the same arguments returns the first one's
    raises               ConfigError when a model exists already or another recipe is installed; DependencyError;
                         RecipeMismatch for a recipe of which Megatron-LM's loop would lose a part
    """
    global _installed
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    refuse_unserved(recipe)
    if backend is not None and backend.strict_exact:
        raise ConfigError(
            "backend.strict_exact: Megatron-LM's loop takes every finite step; leave it out (a GEMM that lost elements"
            " still leaves FP8 carriers after the step), or use fp4dist's own engines"
        )
    wanted = Installation(recipe, seed, backend, allow_recipe_change, keep_masks)
    if _installed is not None:
        return _same(_installed, wanted)
    _refuse_existing_models()
    _make_heard()
    for module in PROVIDERS:
        _rebind(wanted, import_module(module), "LocalSpecProvider", StockSpecProvider)
    for module, name in FINAL_NORMS.items():
        _rebind(wanted, import_module(module), name, fused_norm())
    wanted.rebound.extend(keep_clock_on_replay())
    if _exists("megatron.training"):  # the wheel of megatron-core does not hold Megatron-LM's training package
        _hook_megatron_lm(wanted)
    _installed = wanted
    if env.rank() == 0:
        log.info("fp4dist installed with recipe %s; rebound: %s", recipe.name, ", ".join(wanted.rebound))
    return wanted


def _hook_megatron_lm(installation: Installation) -> None:
    """Apply the recipe where Megatron-LM has built its chunks and before it loads a checkpoint into them."""
    package = import_module("megatron.training")
    for name, function in MODEL_BUILDERS.items():
        if not _exists(name):
            continue
        module = import_module(name)
        builder = _applying(installation, getattr(module, function))
        if getattr(package, function, None) is getattr(module, function):  # scripts import it from the package
            _rebind(installation, package, function, builder)
        _rebind(installation, module, function, builder)
    training = import_module("megatron.training.training")
    _rebind(installation, training, "train", _refusing_without_recipe(installation, training.train))
    _rebind(installation, training, "train_step", _settling(installation, training.train_step))


def _applying(installation: Installation, build: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(build)
    def build_and_apply(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        installation.applied.append(_apply_to_stock(installation, chunks))
        return chunks

    return build_and_apply


def _settling(installation: Installation, train_step: Callable[..., Any]) -> Callable[..., Any]:
    """End each step on all ranks together: what FP8 carriers have lost is merged over the world, and within a step the
    stages of a pipeline wait for each other.
    """

    @wraps(train_step)
    def settled(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        for applied in installation.applied:
            applied.settle()
        return result

    return settled


def _refusing_without_recipe(installation: Installation, train: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(train)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not installation.applied:
            raise RecipeMismatch(
                f"recipe {installation.recipe.name} is installed, but Megatron-LM trains a model that none of"
                f" {', '.join('.'.join(pair) for pair in MODEL_BUILDERS.items())} has built; apply the recipe in the"
                " script with fp4dist.megatron.apply"
            )
        return train(*args, **kwargs)

    return checked


def _apply_to_stock(installation: Installation, chunks: list[nn.Module]) -> AppliedRecipe:
    """The recipe on a model of Megatron-LM, with its clock, its counters' check and its table in log and file."""
    args: Any = import_module("megatron.training").get_args()
    cp = getattr(args, "context_parallel_size", 1)
    applied = apply(
        chunks,
        installation.recipe,
        seed=args.seed if installation.seed is None else installation.seed,
        backend=installation.backend,
        tokens=args.micro_batch_size * args.seq_length // cp,
        allow_recipe_change=installation.allow_recipe_change,
    )
    sharded = any(getattr(args, f"use_{kind}", False) for kind in ("megatron_fsdp", "custom_fsdp", "torch_fsdp2"))
    applied.clock.cache_weights = not sharded  # Megatron-LM changes weights at the end of an iteration only
    models = [unwrap(chunk) for chunk in chunks]
    masks = None
    if not installation.keep_masks and not getattr(args, "reset_attention_mask", False):
        masks = CausalMasks(parallel_state.get_context_parallel_rank(), cp)
        for model in models:
            if any(isinstance(module, SdpaAttention) for module in model.modules()):
                model.register_forward_pre_hook(_without_mask(masks), with_kwargs=True)
    iterations = _Iterations(applied, args, masks)
    MicroBatches(applied, iterations.enter, _micro_batches).attach(models)
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info("%s", applied.table())
        _write_table(applied, args)
    return applied


@dataclass(slots=True)
class _Iterations:
    """Follows Megatron-LM's iteration; after the first one, what ran must be what the table says."""

    applied: AppliedRecipe
    args: Any
    masks: CausalMasks | None
    iteration: int | None = None
    checked: bool = False

    def enter(self) -> None:
        """Called before every training forward of a chunk."""
        iteration = int(self.args.curr_iteration)
        if iteration == self.iteration:
            return
        if self.masks is not None:
            self.masks.check()
        if self.iteration is not None and not self.checked:
            self.applied.check_counts()
            self.checked = True
        self.iteration = iteration
        for message in self.applied.set_step(iteration, self.args.train_iters):
            if not dist.is_initialized() or dist.get_rank() == 0:
                log.info("%s", message)


def _micro_batches() -> int:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return get_num_microbatches()


def _without_mask(masks: CausalMasks) -> Callable[..., Any]:
    """A hook on GPTModel.forward(input_ids, position_ids, attention_mask, ...)."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 2:
            args = (*args[:2], masks.reduce(args[2]), *args[3:])
        elif "attention_mask" in kwargs:
            kwargs = {**kwargs, "attention_mask": masks.reduce(kwargs["attention_mask"])}
        return args, kwargs

    return hook


def _write_table(applied: AppliedRecipe, args: Any) -> None:
    """layers.json beside the checkpoints, else beside the TensorBoard events, else nowhere."""
    folder = getattr(args, "save", None) or getattr(args, "tensorboard_dir", None)
    if not folder or "://" in str(folder):
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "layers.json").write_text(json.dumps(applied.to_json(), indent=1), encoding="utf-8")


def _rebind(installation: Installation, module: ModuleType, name: str, value: Any) -> None:
    if not hasattr(module, name):
        raise DependencyError(
            f"{module.__name__} has no {name}: this Megatron differs from the versions that fp4dist is tested with;"
            " see tests/megatron/test_upstream.py"
        )
    setattr(module, name, value)
    installation.rebound.append(f"{module.__name__}.{name}")


def _exists(module: str) -> bool:
    """Whether a module can be imported, found without importing it (its packages are)."""
    package = module.rpartition(".")[0]
    return module in sys.modules or ((not package or _exists(package)) and find_spec(module) is not None)


def _same(installed: Installation, wanted: Installation) -> Installation:
    names = ("recipe", "seed", "backend", "allow_recipe_change", "keep_masks")
    different = [name for name in names if getattr(installed, name) != getattr(wanted, name)]
    if different:
        raise ConfigError(
            f"fp4dist.megatron.install was called before with another {', '.join(different)} (recipe"
            f" {installed.recipe.name}, now {wanted.recipe.name}); one process trains with one recipe"
        )
    return installed


def _refuse_existing_models() -> None:
    """A model that exists already would stay as it is, silently."""
    if any(issubclass(type(found), GPTModel) for found in gc.get_objects()):
        raise ConfigError(
            "fp4dist.megatron.install: a GPTModel exists already and would stay without FP4; call install first"
        )


def _make_heard() -> None:
    """Let INFO lines of fp4dist reach stdout where the script has not set up logging for them."""
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
