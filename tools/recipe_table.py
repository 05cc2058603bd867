"""Show what a recipe does to a model, linear by linear; needs no GPU and builds no model.

    python tools/recipe_table.py quartet2 --model llama_124m
    python tools/recipe_table.py nvidia_nvfp4 --model configs/models/llama_350m.yaml --tp 8 --micro-batch 4
    python tools/recipe_table.py --all --model llama_124m      # every shipped recipe in one line each

Rules, sizes under tensor parallelism and the tokens of a micro-batch are checked as a run would check them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fp4dist.errors import Fp4DistError
from fp4dist.megatron.sites import gpt_sites
from fp4dist.nn.apply import AppliedRecipe, plan_table
from fp4dist.spec.load import load_model, load_recipe, shipped
from fp4dist.spec.recipe import Recipe
from fp4dist.spec.run import ModelConfig


def main() -> int:
    """Command line."""
    args = _parse()
    try:
        model = load_model(args.model)
        if args.all:
            print("\n".join(_line(load_recipe(name), model, args) for name in shipped("recipes")))
            return 0
        applied = _plan(load_recipe(args.recipe), model, args)
    except Fp4DistError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    print(json.dumps(applied.to_json(), indent=1) if args.json else applied.table())
    return 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("recipe", nargs="?", help="a shipped recipe's name or a YAML file")
    parser.add_argument("--all", action="store_true", help="every shipped recipe, a line each")
    parser.add_argument("--model", default="llama_124m", help="a shipped model's name or a YAML file")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--micro-batch", type=int, default=1, help="samples of a micro-batch")
    parser.add_argument("--json", action="store_true", help="what layers.json would hold")
    args = parser.parse_args()
    if bool(args.recipe) == args.all:
        parser.error("give one recipe, or --all")
    return args


def _plan(recipe: Recipe, model: ModelConfig, args: argparse.Namespace) -> AppliedRecipe:
    return plan_table(gpt_sites(model), recipe, tokens=args.micro_batch * model.seq_length, tp=args.tp)


def _line(recipe: Recipe, model: ModelConfig, args: argparse.Namespace) -> str:
    """Name, FP4's share of the block linears' FLOPs or why it cannot run, paper."""
    try:
        share = f"{_plan(recipe, model, args).to_json()['fp4_share_of_block_linear_flops']:6.1%} FP4"
    except Fp4DistError as e:
        share = f"cannot run: {e}"
    return f"{recipe.name:28} {share}  {recipe.paper}"


if __name__ == "__main__":
    sys.exit(main())
