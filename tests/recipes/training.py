"""Train a tiny Llama under a recipe for a few steps, with everything that the recipe does around the optimizer."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from fp4dist.nn.apply import AppliedRecipe, apply_recipe
from fp4dist.nn.optimizer import attach_optimizer
from fp4dist.spec.load import load_recipe
from fp4dist.spec.recipe import SLOTS, Recipe
from fp4dist.spec.splits import Channels
from tests.tiny_llama import TinyLlama, make_tokens
from tools.compare_recipes import shrunk

STEPS, LR = 10, 3e-4
SPIKE = 4  # at this step the gradients are 3000 times too large
FASTER = 100.0  # what step constants of recipes are divided by, so that every block acts within STEPS


@cache
def fast_recipe(name: str) -> Recipe:
    """The shipped recipe with its step constants made short."""
    return shrunk(load_recipe(name), FASTER)


def width(recipe: Recipe) -> int:
    """Hidden size: the least that every block and rotation divides, twice that where only some channels are chosen."""
    specs = [spec for linear in recipe.linears.values() for slot in SLOTS if (spec := linear.slot(slot))]
    chosen = any(isinstance(spec.outlier, Channels) for spec in specs)
    return max([128, *(spec.columns_multiple for spec in specs)]) * (2 if chosen else 1)


@dataclass
class Run:
    """A model in training."""

    model: TinyLlama
    applied: AppliedRecipe
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    def weights(self) -> list[Tensor]:
        """Every parameter, as it is now."""
        return [p.detach().clone() for p in self.model.parameters()]


def start(recipe: Recipe, steps: int = STEPS, *, lr: float = LR, hidden: int | None = None) -> Run:
    """A fresh model under `recipe` with AdamW; `hidden` by default what the recipe needs."""
    hidden = hidden or width(recipe)
    model = TinyLlama(num_layers=2, hidden=hidden, inner=hidden, heads=2)
    applied = apply_recipe(model, recipe, seed=1, tokens=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    if recipe.steers_optimizer:
        attach_optimizer(applied, optimizer, steps)
    return Run(model, applied, optimizer)


def go_on(run: Run, first: int, last: int, steps: int = STEPS, ratio: Callable[[int], float] = lambda _: 10.0) -> Run:
    """Train steps `first` to `last` - 1 of `steps`, each on other tokens.

    ratio   of gradient to its quantization noise, which phases that wait for it are told
    """
    own_rate = any(phase.enabled and phase.lr is not None for phase in run.applied.recipe.phases)
    for step in range(first, last):
        run.applied.set_step(step, steps)
        if run.applied.measures_noise:
            run.applied.observe_noise(ratio(step))
        if own_rate:
            for group in run.optimizer.param_groups:
                group["lr"] = LR * run.applied.phases.rate(step + 1, steps, lambda _: 1.0)
        run.optimizer.zero_grad()
        loss = run.model(make_tokens(step))
        (loss * (3000.0 if step == SPIKE else 1.0)).backward()
        run.optimizer.step()
        run.losses.append(loss.item())
    run.applied.settle()
    return run


def train(recipe: Recipe, steps: int = STEPS) -> Run:
    """A whole run."""
    return go_on(start(recipe, steps), 0, steps, steps)


@cache
def trained(name: str) -> tuple[list[float], list[Tensor]]:
    """(losses, final weights) of the shipped recipe in a whole run."""
    run = train(fast_recipe(name))
    return run.losses, run.weights()


def saved(run: Run) -> bytes:
    """A checkpoint as a plain user writes it."""
    file = io.BytesIO()
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save(state | {"recipe": run.applied.state_dict()}, file)
    return file.getvalue()


def loaded(recipe: Recipe, checkpoint: bytes, steps: int = STEPS) -> Run:
    """A new process's run from `checkpoint`; nothing but tensors and plain values is unpickled."""
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    run = start(recipe, steps)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.applied.load_state_dict(state["recipe"])
    run.applied.drop_caches()
    return run
