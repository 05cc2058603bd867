"""Run an unchanged Megatron-LM script in FP4: torchrun ... -m fp4dist.megatron --recipe R pretrain_gpt.py ARGS...

Everything after the script's name is the script's. It runs as `__main__`, with its folder first on sys.path, as with
plain python.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse fp4dist's own options, install the recipe, run the script."""
    parser = argparse.ArgumentParser(prog="python -m fp4dist.megatron", description=__doc__)
    parser.add_argument("--recipe", required=True, help="a shipped recipe's name or a YAML file; bf16: provider alone")
    parser.add_argument("--fp4-seed", type=int, help="seed of the rounding noise; default: the script's --seed")
    parser.add_argument("--allow-recipe-change", action="store_true", help="load checkpoints of another recipe")
    parser.add_argument("--keep-masks", action="store_true", help="pass plainly causal attention masks on")
    parser.add_argument("--allow-reference", action="store_true", help="run the slow reference on a GPU")
    parser.add_argument("script", help="such as pretrain_gpt.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args(argv)
    script = Path(options.script)
    if not script.is_file():
        parser.error(f"script: {script} does not exist")
    # Megatron-LM's own megatron package stands beside its scripts and must come before an installed megatron-core
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [str(script), *options.arguments]
    from fp4dist.megatron.pipeline import install
    from fp4dist.spec.run import BackendConfig

    install(
        options.recipe,
        seed=options.fp4_seed,
        backend=BackendConfig(allow_reference=options.allow_reference),
        allow_recipe_change=options.allow_recipe_change,
        keep_masks=options.keep_masks,
    )
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
