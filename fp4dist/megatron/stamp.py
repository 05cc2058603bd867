"""The recipe's name and hash in stock Megatron checkpoints, as the `_extra_state` of our linears.

Megatron's linears write an `_extra_state` of None and ignore what they read, so a stock checkpoint and one of ours load
into each other. The state is a plain dict, the same on every rank: it survives resharding and weights-only reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fp4dist.errors import CheckpointError
from fp4dist.spec.load import recipe_hash
from fp4dist.spec.recipe import Recipe

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RecipeStamp:
    """What a linear writes into a checkpoint and expects to read.

    recipe         name, for messages; `digest` (recipe_hash) decides
    allow_change   load another recipe's checkpoint all the same
    """

    recipe: str
    digest: str
    allow_change: bool = False

    @classmethod
    def of(cls, recipe: Recipe, allow_change: bool = False) -> RecipeStamp | None:
        """The stamp of `recipe`; None for one without FP4, which leaves checkpoints as Megatron writes them."""
        return cls(recipe.name, recipe_hash(recipe), allow_change) if recipe.wants_fp4 else None

    def state(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return {"fp4dist": FORMAT, "recipe": self.recipe, "recipe_hash": self.digest}

    def check(self, state: Any) -> None:
        """Refuse the state of another recipe; CheckpointError. None and the state of other classes tell nothing."""
        if not isinstance(state, dict) or "fp4dist" not in state:
            return
        if state["fp4dist"] != FORMAT:
            raise CheckpointError(
                f"checkpoint: its recipe stamp has format {state['fp4dist']}, this fp4dist reads {FORMAT};"
                " load it with the version that wrote it"
            )
        if state["recipe_hash"] != self.digest and not self.allow_change:
            raise CheckpointError(
                f"checkpoint: it was trained with recipe {state['recipe']} ({state['recipe_hash']}), this run uses"
                f" {self.recipe} ({self.digest}); use that recipe, or allow it:"
                " install(..., allow_recipe_change=True) or --allow-recipe-change"
            )
