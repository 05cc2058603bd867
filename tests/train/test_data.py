"""Batches are Megatron's: the same samples in the same order, on any number of ranks and after a resume."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from fp4dist.errors import ConfigError, DataError
from fp4dist.spec.run import PrepareConfig, RunConfig
from fp4dist.train import data as data_module
from fp4dist.train.data import Batch, build_datasets, check_token_files, ensure_prepared, train_iterator, valid_batches
from fp4dist.train.prepare import PreparedData, prepare, read_meta
from tests.distributed import RankError, run_ranks
from tests.train.token_runs import VOCAB_SIZE, random_documents, run_config, write_tokens

SPLIT = "80,20,0"


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """Fifty documents, about 1,600 tokens: 80 % of them are about 80 samples of 16."""
    return write_tokens(tmp_path / "a", random_documents(50))


@pytest.fixture
def other(tmp_path: Path) -> str:
    return write_tokens(tmp_path / "b", random_documents(80, seed=1))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of one, which Megatron 0.16 needs to build blends."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Tokenizer:
    vocab_size, eod, pad = VOCAB_SIZE, 0, -1
    unique_identifiers = {"class": "the test's"}  # noqa: RUF012


def megatron_samples(config: RunConfig, folder: Path, **data: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Training and validation samples straight from Megatron-core, tokens and the last label."""
    megatron = GPTDatasetConfig(
        random_seed=config.run.seed,
        sequence_length=config.model.seq_length,
        path_to_cache=str(folder / "megatron_cache"),
        tokenizer=Tokenizer(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        **data,
    )
    total = config.train.steps * config.train.global_batch_size
    sizes = [total, config.train.eval_samples, 0]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, megatron).build()
    rows = [[sequence(d[i]) for i in range(n)] for d, n in ((train, total), (valid, config.train.eval_samples))]  # type: ignore[index]
    return rows[0], rows[1]


def sequence(sample: dict[str, torch.Tensor]) -> list[int]:
    assert sample["loss_mask"].all()
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


def rows(batches: Iterator[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch_rows(batch)]


def batch_rows(batch: Batch) -> list[list[int]]:
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    return torch.cat([batch.tokens, batch.labels[:, -1:]], dim=1).tolist()


def train_rows(config: RunConfig, dp_size: int = 1, consumed: int = 0) -> list[list[list[int]]]:
    """Per data-parallel rank, the samples it reads."""
    sets = build_datasets(config, dp_size)
    each = range(dp_size)
    return [rows(train_iterator(sets, config, dp_rank=r, dp_size=dp_size, consumed_samples=consumed)) for r in each]


def test_a_batch(prefix: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT})
    sets = build_datasets(config, 1)
    batches = list(train_iterator(sets, config, dp_rank=0, dp_size=1))
    assert len(batches) == 5 * 8 // 2
    for batch in batches:
        for tensor in (batch.tokens, batch.labels, batch.position_ids):
            assert tensor.shape == (2, 16)
            assert tensor.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.float32
        assert torch.equal(batch.loss_mask, torch.ones(2, 16))
        assert torch.equal(batch.position_ids, torch.arange(16).expand(2, 16))
    # Every sample is text of the training documents, in their (shuffled) order without gaps.
    documents = random_documents(50)[:40]
    pairs = {(int(x), int(y)) for d in documents for x, y in itertools.pairwise(d)}
    joints = {(int(x[-1]), int(y[0])) for x in documents for y in documents}
    assert all(p in pairs | joints for row in rows(iter(batches)) for p in itertools.pairwise(row))


def test_one_file_equals_megatron(prefix: str, other: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT})
    train, valid = megatron_samples(config, tmp_path, blend=([prefix], None), split=SPLIT)
    assert train_rows(config)[0] == train
    assert rows(valid_batches(build_datasets(config, 1), config, dp_rank=0, dp_size=1)) == valid
    separate = run_config(tmp_path, {"train": (prefix,), "valid": (other,)})
    blends = [([prefix], None), ([other], None), None]
    train, valid = megatron_samples(separate, tmp_path, blend_per_split=blends)
    assert train_rows(separate)[0] == train
    assert rows(valid_batches(build_datasets(separate, 1), separate, dp_rank=0, dp_size=1)) == valid


def test_many_epochs_equal_megatron(prefix: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT}, steps=60)
    train, _ = megatron_samples(config, tmp_path, blend=([prefix], None), split=SPLIT)
    assert len(train) == 480
    assert train_rows(config)[0] == train


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.usefixtures("one_rank")
def test_blends_equal_megatron(prefix: str, other: str, tmp_path: Path, weighted: bool, separate: bool) -> None:
    entries = ("0.3", prefix, "0.7", other) if weighted else (prefix, other)
    weights = [0.3, 0.7] if weighted else None
    blend = ([prefix, other], weights)
    if separate:
        held_out = write_tokens(tmp_path / "c", random_documents(30, seed=2))
        config = run_config(tmp_path, {"train": entries, "valid": (held_out,)})
        train, valid = megatron_samples(config, tmp_path, blend_per_split=[blend, ([held_out], None), None])
    else:
        config = run_config(tmp_path, {"train": entries, "split": SPLIT})
        train, valid = megatron_samples(config, tmp_path, blend=blend, split=SPLIT)
    assert train_rows(config)[0] == train
    if separate or weighted:
        assert rows(valid_batches(build_datasets(config, 1), config, dp_rank=0, dp_size=1)) == valid


def test_blends_without_a_process_group_and_beyond_one_epoch(prefix: str, other: str, tmp_path: Path) -> None:
    assert not dist.is_initialized()
    config = run_config(tmp_path, {"train": (prefix, other), "split": SPLIT}, steps=100)
    assert len(train_rows(config)[0]) == 800
    weighted = run_config(tmp_path, {"train": ("1", prefix, "3", other), "split": SPLIT})
    assert len(train_rows(weighted)[0]) == 40


def test_order_does_not_depend_on_the_ranks(prefix: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT})
    [alone] = train_rows(config)
    for dp_size in (2, 4):
        per_rank = train_rows(config, dp_size)
        together = [per_rank[r][k : k + 2] for k in range(0, 40 // dp_size, 2) for r in range(dp_size)]
        assert [row for two in together for row in two] == alone


def test_resume_by_consumed_samples(prefix: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT})
    [alone] = train_rows(config)
    for consumed in (0, 8, 24, 40):
        assert train_rows(config, consumed=consumed) == [alone[consumed:]]
    first, second = train_rows(config, dp_size=2, consumed=16)
    assert first[:2] + second[:2] == alone[16:20]
    for consumed, dp_size in ((-8, 1), (48, 1), (7, 1), (10, 2)):
        with pytest.raises(ConfigError, match=f"consumed_samples = {consumed} must be"):
            train_rows(config, dp_size, consumed)


def test_seed_and_length_of_the_run_decide_the_order(prefix: str, tmp_path: Path) -> None:
    data = {"train": (prefix,), "split": SPLIT}
    config = run_config(tmp_path, data)
    assert train_rows(config) == train_rows(run_config(tmp_path / "again", data))
    assert train_rows(config) != train_rows(run_config(tmp_path, data, seed=8))
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, stop_after=2))
    assert train_rows(config) == train_rows(stopped)


def test_workers_change_nothing(prefix: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT})
    workers = run_config(tmp_path, {"train": (prefix,), "split": SPLIT, "num_workers": 2})
    assert train_rows(config) == train_rows(workers)
    assert torch.equal(torch.get_rng_state(), state), "reading data must not draw from the run's random numbers"


def test_validation_samples_are_the_same_every_time_on_any_ranks(prefix: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT}, eval_samples=5)
    sets = build_datasets(config, 1)

    def masked(dp_size: int) -> list[tuple[list[int], float]]:
        per_rank = [list(valid_batches(sets, config, dp_rank=r, dp_size=dp_size)) for r in range(dp_size)]
        assert len({len(batches) for batches in per_rank}) == 1, "ranks must run the same number of forwards"
        together = [batch for turn in zip(*per_rank, strict=True) for batch in turn]
        assert all(batch.tokens.shape == (2, 16) for batch in together)
        return [x for b in together for x in zip(batch_rows(b), b.loss_mask.sum(dim=1).tolist(), strict=True)]

    alone = masked(1)
    assert [m for _, m in alone] == [16.0] * 5 + [0.0]
    assert masked(1) == alone
    four = masked(4)
    assert four[:5] == alone[:5]
    assert [m for _, m in four] == [16.0] * 5 + [0.0] * 3
    assert len({tuple(row) for row, _ in alone[:5]}) == 5, "no sample twice"
    none = run_config(tmp_path, {"train": (prefix,), "split": SPLIT}, eval_samples=0)
    assert build_datasets(none, 1).valid is None
    assert list(valid_batches(build_datasets(none, 1), none, dp_rank=0, dp_size=1)) == []


def test_caches_follow_the_files_not_their_names(prefix: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT})
    before = train_rows(config)
    caches = {path.name for path in (tmp_path / "run" / "data_cache").iterdir()}
    assert train_rows(config) == before
    assert {path.name for path in (tmp_path / "run" / "data_cache").iterdir()} == caches, "read, not built again"
    write_tokens(tmp_path / "a", random_documents(70, seed=5))
    new = train_rows(config)
    fresh = run_config(tmp_path / "fresh", {"train": (prefix,), "split": SPLIT})
    assert new == train_rows(fresh) != before


def test_half_written_caches_are_built_again(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config(tmp_path, {"train": (prefix,), "split": SPLIT, "cache_dir": str(tmp_path / "cache")})
    before = train_rows(config)
    damaged = sorted((tmp_path / "cache").glob("*.npy"))
    assert len(damaged) == 6
    for path, size in zip(damaged, (0, 3, 90, 140, 150, None), strict=True):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1 if size is None else size)
    with caplog.at_level(logging.WARNING, "fp4dist"):
        assert train_rows(config) == before
    assert caplog.text.count("is damaged") == 6


def test_parts_that_are_too_short_are_refused(prefix: str, tmp_path: Path) -> None:
    """Megatron would loop for ever over the empty validation part of six documents."""
    books = write_tokens(tmp_path / "books", [np.full(1000, 5)] * 6)
    with pytest.raises(DataError, match="0 samples"):
        build_datasets(run_config(tmp_path, {"train": (books,)}), 1)
    with pytest.raises(DataError, match="0 tokens to training"):
        build_datasets(run_config(tmp_path, {"train": (prefix,), "split": "0,1,0"}), 1)
    with pytest.raises(ConfigError, match=r"global_batch_size = 8 .* 2 \* 3"):
        build_datasets(run_config(tmp_path, {"train": (prefix,), "split": SPLIT}), 3)


def test_batches_are_read_one_ahead_and_errors_arrive_in_their_place() -> None:
    """No more than one, so that a step that goes on later has lost nothing but a reading; no thread is left."""
    read: list[int] = []

    def source() -> Iterator[Any]:
        for number in range(5):
            if number == 3:
                raise DataError("the fourth is damaged")
            read.append(number)
            yield number

    batches = data_module._read_ahead(source())
    assert next(batches) == 0
    assert read in ([0], [0, 1])
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(DataError, match="fourth"):
        next(batches)
    abandoned = data_module._read_ahead(source())
    assert next(abandoned) == 0
    abandoned.close()  # type: ignore[attr-defined]  # a generator
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def rank_rows(config: RunConfig) -> tuple[list[list[int]], list[list[int]]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    sets = build_datasets(config, size)
    return (
        rows(train_iterator(sets, config, dp_rank=rank, dp_size=size)),
        rows(valid_batches(sets, config, dp_rank=rank, dp_size=size)),
    )


@pytest.mark.distributed
def test_two_ranks_read_what_one_reads(prefix: str, other: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": ("0.4", prefix, "0.6", other), "split": SPLIT})
    (first, first_valid), (second, second_valid) = run_ranks(rank_rows, 2, config)
    together = [row for k in range(0, 20, 2) for row in first[k : k + 2] + second[k : k + 2]]
    alone = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "alone")))
    assert [together] == train_rows(alone)
    assert first_valid + second_valid == rows(valid_batches(build_datasets(alone, 1), alone, dp_rank=0, dp_size=1))


# Preparing


def words(path: Path, documents: int = 40) -> str:
    rng = np.random.default_rng(3)
    text = [" ".join(f"word{i}" for i in rng.integers(0, 50, 60)) for _ in range(documents)]
    path.write_text("\n<|endoftext|>\n".join(text))
    return str(path)


def prepared_config(folder: Path, source: str, **options: Any) -> RunConfig:
    plan = PrepareConfig(sources=(source,), **{"vocab_size": 300, "valid_fraction": 0.3, **options})
    prefix = str(folder / "data" / "words")
    config = run_config(folder, {"train": (prefix,), "valid": (f"{prefix}_valid",), "prepare": plan})
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=301))


def test_missing_files_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = words(tmp_path / "words.txt")
    config = prepared_config(tmp_path, source)
    ensure_prepared(config)
    check_token_files(config)
    assert len(train_rows(config)[0]) == 40
    assert rows(valid_batches(build_datasets(config, 1), config, dp_rank=0, dp_size=1))
    calls: list[Any] = []
    monkeypatch.setattr(data_module, "prepare", lambda *args: calls.append(args) or prepare(*args))
    ensure_prepared(config)
    assert calls == []
    (tmp_path / "data" / "words_valid.idx").unlink()
    ensure_prepared(config)
    assert len(calls) == 1
    Path(source).unlink()
    ensure_prepared(config)  # the raw text need not be kept


def test_neither_text_nor_tokenizer_need_be_kept(tmp_path: Path) -> None:
    source = words(tmp_path / "words.txt")
    ensure_prepared(prepared_config(tmp_path, source))
    tokenizer = (tmp_path / "data" / "words.tokenizer.json").rename(tmp_path / "tokenizer.json")
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    config = prepared_config(tmp_path, source, tokenizer=str(tokenizer))
    ensure_prepared(config)
    Path(source).unlink()
    tokenizer.unlink()
    ensure_prepared(config)
    with pytest.raises(DataError, match=r"valid_fraction = 0\.3, but data\.prepare asks for 0\.4"):
        ensure_prepared(prepared_config(tmp_path, source, tokenizer=str(tokenizer), valid_fraction=0.4))


def test_files_of_another_plan_are_refused(tmp_path: Path) -> None:
    source = words(tmp_path / "words.txt")
    ensure_prepared(prepared_config(tmp_path, source))
    for options, message in (
        ({"vocab_size": 301}, "tokenizer = .*300.* asks for .*301"),
        ({"valid_fraction": 0.4}, "valid_fraction = 0.3, but data.prepare asks for 0.4"),
        ({"document_separator": None}, "document_separator"),
    ):
        with pytest.raises(DataError, match=rf"words: was prepared with {message}.*name another prefix"):
            ensure_prepared(prepared_config(tmp_path, source, **options))
    words(tmp_path / "words.txt", documents=41)
    with pytest.raises(DataError, match="was prepared with sources"):
        ensure_prepared(prepared_config(tmp_path, source))


def test_files_made_by_others_are_left_alone(prefix: str, tmp_path: Path) -> None:
    before = Path(f"{prefix}.idx").read_bytes()
    plan = PrepareConfig(sources=(words(tmp_path / "words.txt"),))
    config = run_config(tmp_path, {"train": (prefix,), "prepare": plan})
    ensure_prepared(dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=4096)))
    assert Path(f"{prefix}.idx").read_bytes() == before
    ensure_prepared(run_config(tmp_path, {"train": (prefix,)}))


def test_a_plan_must_fit_the_run(tmp_path: Path) -> None:
    config = prepared_config(tmp_path, words(tmp_path / "words.txt"), vocab_size=302)
    with pytest.raises(ConfigError, match=r"data\.prepare\.vocab_size = 302 .* model\.vocab_size = 301"):
        ensure_prepared(config)
    plan = PrepareConfig(sources=("a.txt",), valid_fraction=0.1)
    with pytest.raises(ValueError, match=r"set valid: \[a_valid\]"):
        run_config(tmp_path, {"train": ("a",), "prepare": plan})
    with pytest.raises(ValueError, match="must be the one prefix"):
        run_config(tmp_path, {"train": ("a", "b"), "prepare": plan})


def rank_prepares(config: RunConfig, nodes: int = 1, rank0_first: bool = True) -> int:
    """How often this rank did the work itself."""
    if nodes > 1:
        os.environ["LOCAL_RANK"] = "0"
    made: list[PreparedData] = []
    data_module.prepare = lambda *args: made.append(prepare(*args))  # type: ignore[assignment]
    ensure_prepared(config, rank0_first=rank0_first)
    meta: Any = read_meta(config.data.train[0])
    assert meta["documents"] > 0
    return sum(not m.reused for m in made)


@pytest.mark.distributed
def test_one_rank_prepares_and_errors_reach_all(tmp_path: Path) -> None:
    config = prepared_config(tmp_path, words(tmp_path / "words.txt"))
    assert run_ranks(rank_prepares, 2, config) == [1, 0]
    nodes = prepared_config(tmp_path / "nodes", words(tmp_path / "words.txt"))
    assert run_ranks(rank_prepares, 2, nodes, 2) == [1, 0]
    together = prepared_config(tmp_path / "together", words(tmp_path / "words.txt"))
    assert sum(run_ranks(rank_prepares, 2, together, 2, False)) == 1, "on a shared disk the lock lets one of them work"
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(RankError, match=r"(?s)rank 0.*bad\.txt: byte 0xff.*rank 1.*bad\.txt: byte 0xff") as error:
        run_ranks(rank_prepares, 2, prepared_config(tmp_path / "bad", str(bad)))
    assert isinstance(error.value.error, DataError)


def test_pieces_are_cut_as_megatron_cuts_them() -> None:
    """Rank r of 2 keeps pieces r and 3 - r of 4, of every tensor; together they are the batch."""
    tokens = torch.arange(2 * 16).view(2, 16)
    batch = Batch(tokens, tokens + 100, (tokens % 3 > 0).float(), tokens % 16)
    first, second = (data_module.own_pieces(batch, rank, 2) for rank in (0, 1))
    assert torch.equal(first.tokens, tokens[:, [0, 1, 2, 3, 12, 13, 14, 15]])
    assert torch.equal(second.tokens, tokens[:, 4:12])
    for name in ("labels", "loss_mask", "position_ids"):
        whole, (early, late) = getattr(batch, name), getattr(first, name).chunk(2, 1)
        assert torch.equal(torch.cat([early, getattr(second, name), late], 1), whole)
    assert data_module.own_pieces(batch, 0, 1) is batch
