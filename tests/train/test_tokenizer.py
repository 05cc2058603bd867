"""Tokenizers for preparing text: trained or loaded, and cuts that do not change a token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fp4dist.errors import DataError
from fp4dist.spec.load import config_root
from fp4dist.train import corpus, tokenizer
from fp4dist.train.corpus import END_OF_TEXT, Block, inspect_source, read_blocks
from fp4dist.train.tokenizer import TextTokenizer, hash_tokenizer, load_tokenizer, train_bpe

AUSTEN = config_root() / "data" / "austen.txt.bz2"


@pytest.fixture(scope="module")
def novel() -> str:
    """About 400 kB of prose."""
    blocks = list(read_blocks(inspect_source(AUSTEN)))
    return "\n\n".join(block.text for block in blocks[:25])


@pytest.fixture(scope="module")
def bpe(novel: str) -> TextTokenizer:
    return train_bpe([novel], 1000, END_OF_TEXT)


def ids_of(tok: TextTokenizer, text: str) -> list[int]:
    return tok.encode([text])[0].tolist()


def cut_and_encode(tok: TextTokenizer, blocks: list[Block]) -> tuple[int, list[int]]:
    pieces = list(tok.pieces(blocks))
    assert [p.first for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [p.last for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(p.text for p in pieces) == "".join(b.text for b in blocks)
    return len(pieces), [i for ids in tok.encode([p.text for p in pieces]) for i in ids.tolist()]


def test_training(bpe: TextTokenizer, novel: str) -> None:
    assert bpe.vocab_size == 1000
    assert bpe.eot_id == 0
    assert bpe.tokenizer.decode(ids_of(bpe, novel)) == novel
    strange = "tabs\t\tand\r\n中文 emoji 🙂 \x00 \u00a0 "
    assert bpe.tokenizer.decode(ids_of(bpe, strange)) == strange
    assert train_bpe([novel], 1000, END_OF_TEXT).sha256 == bpe.sha256, "training must be deterministic"
    assert train_bpe(["tiny"], 1000, END_OF_TEXT).vocab_size < 300


def test_text_cannot_end_a_document(bpe: TextTokenizer) -> None:
    text = f"before {END_OF_TEXT} after"
    assert bpe.eot_id not in ids_of(bpe, text)
    assert bpe.tokenizer.decode(ids_of(bpe, text)) == text


def test_loading_ignores_what_would_change_the_text(bpe: TextTokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_str(bpe.text)
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, bpe.eot_id)]
    )
    path = tmp_path / "tokenizer.json"
    other.save(str(path))
    loaded = load_tokenizer(path, END_OF_TEXT)
    text = "It is a truth universally acknowledged, that a single man"
    assert ids_of(loaded, text) == ids_of(bpe, text)
    assert loaded.sha256 == hash_tokenizer(path) != bpe.sha256


@pytest.mark.parametrize("block_chars", [1000, 1 << 16, 1 << 30])
def test_cuts_do_not_change_tokens(
    bpe: TextTokenizer, novel: str, block_chars: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus, "BLOCK_CHARS", block_chars)
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 3000)
    path = tmp_path / "a.txt"
    path.write_text(novel)
    pieces, ids = cut_and_encode(bpe, list(read_blocks(inspect_source(path))))
    assert pieces > len(novel) / 4000
    assert ids == ids_of(bpe, novel)


def test_cuts_of_text_that_must_stay_whole(bpe: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 100)
    for text in ("中文" * 1000, "x" * 5000, " " * 2000, "\n" * 2000, "a\n\n" * 300, ".\n" * 500):
        blocks = [Block(text[i : i + 300], i == 0, i + 300 >= len(text)) for i in range(0, len(text), 300)]
        assert cut_and_encode(bpe, blocks)[1] == ids_of(bpe, text)


def test_cuts_are_tried_on_the_tokenizer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pre-tokenization a token spans words, so a cut between words is wrong and must not be made."""
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 50)
    plain = Tokenizer(models.BPE({"a": 0, " ": 1, "a ": 2, "a a": 3, END_OF_TEXT: 4}, [("a", " "), ("a ", "a")]))
    tok = TextTokenizer(plain, "", 5, 4, END_OF_TEXT)
    text = "a " * 400 + "a"
    assert cut_and_encode(tok, [Block(text, True, True)])[1] == ids_of(tok, text)
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    pieces, ids = cut_and_encode(tok, [Block(text, True, True)])
    assert pieces > 10
    assert ids == ids_of(tok, text)


def test_bad_tokenizer_files(bpe: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"

    def refused(pattern: str, eot: str = END_OF_TEXT) -> None:
        with pytest.raises(DataError, match=pattern) as error:
            load_tokenizer(path, eot)
        assert "tokenizer.json" in str(error.value)

    refused("no such file")
    path.write_bytes(b"\xff\xfe\x00")
    refused("not a tokenizers JSON")
    path.write_text("{oops")
    refused("not JSON")
    path.write_text(json.dumps({"vocab": {}}))
    refused("no 'model'")
    path.write_text(bpe.text)
    refused(r"no token '</s>' .* special tokens: '<\|endoftext\|>'", "</s>")
