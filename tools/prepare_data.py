"""Make Megatron-core token files from text: `python tools/prepare_data.py books.txt.bz2 --prefix data/books`.

Sources are .txt, .md or .jsonl, plain or .bz2 .gz .zst. Stopping is harmless: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import sys

from fp4dist.errors import Fp4DistError
from fp4dist.spec.build import build
from fp4dist.spec.run import PrepareConfig
from fp4dist.train.prepare import prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="text files; their documents keep this order")
    parser.add_argument("--prefix", required=True, help="writes PREFIX.bin, .idx, .tokenizer.json and .meta.json")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer", help="a tokenizer.json of the tokenizers library")
    vocabulary.add_argument("--vocab-size", type=int, default=32768, help="of the BPE to train (default %(default)s)")
    parser.add_argument("--eot-token", default="<|endoftext|>", help="ends each document (default %(default)s)")
    parser.add_argument("--jsonl-key", default="text", help="the key of the text (default %(default)s)")
    parser.add_argument("--separator", default="<|endoftext|>", help="a line that ends a document ('' for none)")
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="share of documents for PREFIX_valid")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fp4dist").setLevel(logging.INFO)
    plan = {
        "sources": args.sources,
        "tokenizer": args.tokenizer,
        "vocab_size": args.vocab_size,
        "eot_token": args.eot_token,
        "jsonl_key": args.jsonl_key,
        "document_separator": args.separator or None,
        "valid_fraction": args.valid_fraction,
    }
    try:
        prepare(build(PrepareConfig, plan), args.prefix)
    except Fp4DistError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
