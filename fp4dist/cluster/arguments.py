"""Command-line words that several commands share: the job, and a layout as `tp=4,pp=8`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from typing import get_args

from fp4dist.cluster.planner import Job
from fp4dist.cluster.topology import load_topology
from fp4dist.errors import ConfigError
from fp4dist.spec.cluster import Layout, Precision
from fp4dist.spec.load import load_model, load_recipe

LAYOUT_KEYS = ("tp", "pp", "vpp", "cp", "ep", "etp", "fsdp")


def add_job(parser: argparse.ArgumentParser) -> None:
    """--model --topology --gpus --precision | --recipe --gbs --seq."""
    parser.add_argument("--model", required=True, help="name or path of a model")
    parser.add_argument("--topology", required=True, help="name or path of a topology")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--precision", choices=get_args(Precision), help="of every linear in the blocks")
    parser.add_argument("--recipe", help="name or path of a recipe, instead of --precision")
    parser.add_argument("--gbs", type=int, help="samples a step; default: 4 million tokens, in whole samples a GPU")
    parser.add_argument("--seq", type=int, help="tokens of a sample; default: the model's")


def job_of(args: argparse.Namespace, fixed: str = "") -> Job:
    """The job that the arguments mean. Raises ConfigError for what is missing or unknown."""
    model = load_model(args.model)
    recipe = load_recipe(args.recipe) if args.recipe else None
    if recipe is not None and args.precision:
        raise ConfigError("give --precision or --recipe, not both")
    seq = args.seq or model.seq_length
    for name, value in (("--gpus", args.gpus), ("--seq", seq), ("--gbs", 1 if args.gbs is None else args.gbs)):
        if value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
    return Job(
        model=model,
        topology=load_topology(args.topology),
        gpus=args.gpus,
        gbs=args.gbs or max(1, round(4e6 / seq / args.gpus)) * args.gpus,
        seq=seq,
        precision=None if recipe is not None else args.precision or "bf16",
        recipe=recipe,
        fixed=tuple(_dimensions(fixed, "--fix").items()),
    )


def parse_layout(text: str, micro_batch: int = 1) -> Layout:
    """`tp=4,pp=8,vpp=8,cp=2,ep=1` as a Layout; keys that are left out are 1. Raises ConfigError."""
    values = _dimensions(text, "--layout")
    try:
        return dataclasses.replace(Layout(micro_batch=micro_batch), **values)
    except ValueError as e:
        raise ConfigError(f"--layout: {e}") from e


def _dimensions(text: str, option: str) -> dict[str, int]:
    values: dict[str, int] = {}
    for part in (p.strip() for p in text.split(",") if p.strip()):
        key, sign, value = part.partition("=")
        key = key.strip()
        if not sign or key not in LAYOUT_KEYS:
            near = difflib.get_close_matches(key, LAYOUT_KEYS, 1)
            hint = f"; did you mean {near[0]!r}?" if near and sign else f"; keys: {', '.join(LAYOUT_KEYS)}"
            raise ConfigError(f"{option} {part!r}: expected key=number{hint}")
        if key in values:
            raise ConfigError(f"{option}: {key} is given twice")
        if not value.strip().isdecimal():
            raise ConfigError(f"{option} {key} = {value!r} must be a whole number of at least 1")
        values[key] = int(value)
    return values
