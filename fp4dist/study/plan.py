"""A study file: recipes x model sizes x token budgets x seeds, and the runs that it means.

Runs of one size, budget and seed start from the same weights and see the same samples in the same order; they differ
in the recipe alone. Sections of the file are the fields of `Study`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4dist.errors import ConfigError
from fp4dist.spec.build import plain
from fp4dist.spec.frozen import frozen
from fp4dist.spec.load import canonical_digest, changed_recipe, load_model, load_spec
from fp4dist.spec.recipe import BLOCK_ROLES, Recipe
from fp4dist.spec.run import ModelConfig

BASELINE = "bf16"  # the arm that gaps are measured from


@frozen
class Arm:
    """One recipe of a study.

    name           in tables and files; default: the recipe's
    recipe         a shipped name or a path;  change   laid over its file, as `extends` does
    every_linear   every block linear runs in FP4 and no phase acts: rules that keep block linears in high precision
                   and phases are left out, so that recipes are ordered by their quantizers alone
    seeds          that it runs with, where those are fewer than the study's: arms that nothing close stands beside
    published      gap to bf16 that its authors measured (nats), for the ratio in the table
    """

    recipe: str
    name: str = ""
    change: dict[str, Any] = field(default_factory=dict)
    every_linear: bool = False
    seeds: tuple[int, ...] = ()
    published: float | None = None


@frozen
class Size:
    """A model with the settings that depend on its size. micro_batch   sequences of one forward pass"""

    model: str
    lr: float
    micro_batch: int


@frozen
class Study:
    """What is trained, on what, and what is compared.

    tokens            budgets;  baseline_tokens   further ones for bf16 alone: its slope gives time to quality
    ordering          arms from the smallest published gap to the largest: each neighbour pair is tested
    train, valid      prefixes of token files; the order of `train`'s samples is drawn from the run's seed
    batch, seq_length sequences a step, tokens a sequence
    warmup            share of the run; the rate goes lr * start -> lr -> lr * end on two half cosines
    evaluations       of the held-out files, evenly spread, beside the last one
    epochs            how often a sample may be seen
    """

    name: str
    sizes: tuple[Size, ...]
    tokens: tuple[int, ...]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    train: tuple[str, ...]
    valid: tuple[str, ...]
    baseline_tokens: tuple[int, ...] = ()
    ordering: tuple[str, ...] = ()
    batch: int = 512
    seq_length: int = 512
    warmup: float = 0.1
    start: float = 0.01
    end: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0
    evaluations: int = 4
    epochs: int = 1
    source: str = ""  # of the arms' `published`

    def __post_init__(self) -> None:
        names = [name_of(arm) for arm in self.arms]
        if len(set(names)) != len(names):
            raise ValueError(f"arms = {names}: two have one name; give them `name`")
        if BASELINE not in names:
            raise ValueError(f"arms = {names}: gaps are measured from {BASELINE}; add it")
        for arm in self.arms:
            if unknown := set(arm.seeds) - set(self.seeds):
                raise ValueError(f"arm {name_of(arm)} has seeds {sorted(unknown)}, which are none of the study's")
        if unknown := set(self.ordering) - set(names):
            raise ValueError(f"ordering names {sorted(unknown)}, which are no arms")
        for size in self.sizes:
            if self.batch % size.micro_batch:
                raise ValueError(f"batch = {self.batch} is not a multiple of micro_batch = {size.micro_batch}")
        if min(*self.tokens, *self.baseline_tokens, self.batch * self.seq_length) < self.batch * self.seq_length:
            raise ValueError(f"a budget is below the {self.batch * self.seq_length} tokens of one step")
        if not (0 <= self.warmup < 1 and self.epochs >= 1 and self.evaluations >= 0):
            raise ValueError("warmup must be in [0, 1), epochs at least 1, evaluations not negative")


def name_of(arm: Arm) -> str:
    """The arm's name."""
    return arm.name or Path(arm.recipe).stem


def load_study(name_or_path: str | Path) -> Study:
    """Read a study by shipped name or by path."""
    return load_spec(Study, "studies", name_or_path)


def recipe_of(arm: Arm) -> Recipe:
    """The recipe that the arm runs."""
    recipe = changed_recipe(arm.recipe, {**arm.change, "name": name_of(arm)})
    return every_linear(recipe) if arm.every_linear else recipe


def every_linear(recipe: Recipe) -> Recipe:
    """`recipe` without phases and without the rules that keep linears of blocks in high precision."""
    quantized = {name for name in recipe.linears if not recipe.linear(name).is_high_precision}
    rules = tuple(
        r for r in recipe.rules if r.linear in quantized or not set(r.roles or BLOCK_ROLES) & set(BLOCK_ROLES)
    )
    used = {name: linear for name, linear in recipe.linears.items() if name in {rule.linear for rule in rules}}
    return replace(recipe, linears=used, rules=rules, phases=())


class Job:
    """One run of a study."""

    def __init__(self, study: Study, size: Size, arm: Arm, tokens: int, seed: int) -> None:
        self.study, self.size, self.arm, self.tokens, self.seed = study, size, arm, tokens, seed

    @property
    def steps(self) -> int:
        """Optimizer steps: the budget in whole steps, at least."""
        return -(-self.tokens // (self.study.batch * self.study.seq_length))

    @property
    def name(self) -> str:
        """Of its files: size, budget, arm, seed."""
        return f"{Path(self.size.model).stem}-{self.tokens / 1e6:g}M-{name_of(self.arm)}-s{self.seed}"

    @cached_property
    def model(self) -> ModelConfig:
        """The model with the study's sequence length."""
        return replace(load_model(self.size.model), seq_length=self.study.seq_length)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe."""
        return recipe_of(self.arm)

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the numbers but the token files' contents: records of one are runs of one kind."""
        return fingerprint(self.config({}))

    def config(self, data: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides the numbers, as plain data. data   what identifies the token files"""
        study = plain(self.study)
        for key in (
            "name",
            "arms",
            "sizes",
            "tokens",
            "seeds",
            "baseline_tokens",
            "ordering",
            "train",
            "valid",
            "source",
        ):
            del study[key]
        return {
            **study,
            "size": plain(self.size),
            "model": plain(self.model),
            "recipe": plain(self.recipe),
            "steps": self.steps,
            "seed": self.seed,
            "data": data,
        }


def digest(config: dict[str, Any]) -> str:
    """16 hex digits of a run's configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def identity(config: dict[str, Any]) -> str:
    """16 hex digits of what a run's configuration means: the recipe's name and notes left out, and fields that a later
    version of the program has added where they mean what was before. Equal for runs that need not be repeated.
    """
    recipe = {key: value for key, value in config["recipe"].items() if key not in ("name", "paper", "notes")}
    return canonical_digest({**config, "recipe": recipe})


def fingerprint(config: dict[str, Any]) -> str:
    """`identity` of a run's configuration without its data."""
    return identity({**config, "data": {}})


def jobs(study: Study, arms: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> list[Job]:
    """The runs, most wanted first: every arm for a first seed before any for a second. ConfigError for unknown names.

    So what a deadline leaves is a whole table with fewer seeds.

    arms, seeds   only these; empty: all
    """
    known = {name_of(arm): arm for arm in study.arms}
    if unknown := set(arms) - known.keys():
        raise ConfigError(f"study {study.name} has no arms {sorted(unknown)}; it has {', '.join(known)}")
    if strange := set(seeds) - set(study.seeds):
        raise ConfigError(
            f"study {study.name} has no seeds {sorted(strange)}; it has {list(study.seeds)}: add them there"
        )
    found = []
    for seed in seeds or study.seeds:
        for size in study.sizes:
            budgets = [(tokens, arm) for tokens in study.tokens for arm in study.arms]
            budgets += [(tokens, known[BASELINE]) for tokens in study.baseline_tokens if tokens not in study.tokens]
            budgets = [(t, a) for t, a in budgets if not a.seeds or seed in a.seeds]
            found += [Job(study, size, a, t, seed) for t, a in budgets if not arms or name_of(a) in arms]
    return found
