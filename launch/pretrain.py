#!/usr/bin/env python
"""Pretrain a model from a run file.

    deepspeed launch/pretrain.py --config configs/runs/quickstart.yaml            every GPU of this host, or its CPU
    torchrun --nproc-per-node 4 launch/pretrain.py --config configs/runs/llama_124m.yaml
    python launch/pretrain.py --config quickstart --set recipe=quartet2 --set train.steps=50
    python launch/pretrain.py --config quickstart --dry-run

Exit codes: 0 done or interrupted in good order, 2 something to correct (the last line says what),
22 ranks with different environments, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import sys


def main() -> int:
    """Parse, load, run."""
    args = _parse()
    try:
        from fp4dist import env
        from fp4dist.errors import Fp4DistError
    except ModuleNotFoundError as missing:
        print(f"{missing}; install fp4dist first: pip install -c constraints.txt -e .", file=sys.stderr)
        return 2
    try:
        _log_to_stdout(logging.WARNING if args.dry_run else logging.INFO if env.rank() == 0 else logging.ERROR)
        from fp4dist.spec.load import load_run

        config = load_run(args.config, args.set)
        from fp4dist.train import loop

        if args.dry_run:
            if env.rank() == 0:
                print(loop.dry_run(config))
        else:
            loop.run(config)
    except (Fp4DistError, OSError) as e:
        everywhere = isinstance(e, Fp4DistError)  # the same on all ranks; a disk may fail on one
        if env.rank() == 0 or not everywhere:
            print(f"{'' if everywhere else f'rank {env.rank()}: '}{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        return getattr(e, "exit_code", 2)
    return 0


def _parse() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=plain)
    parser.add_argument("--config", required=True, help="a run file, or the name of a shipped one")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print configuration, layers, parameters, memory")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    return parser.parse_args()


def _log_to_stdout(level: int) -> None:
    """Our messages, one line each with the time; other packages keep their own ways."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger = logging.getLogger("fp4dist")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


if __name__ == "__main__":  # checkpoints are written by a spawned process that imports this file again
    sys.exit(main())
