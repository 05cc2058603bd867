"""Token files -> batches, in Megatron's order.

The datasets are Megatron-core's own (GPTDataset, BlendedDataset), so existing `.bin/.idx` files, blends and splits mean
here what they mean there. Sample k of the run is `train[k]`: step s, micro-batch i and data-parallel rank r of R read

    s * global_batch_size + (i * R + r) * micro_batch_size + [0 .. micro_batch_size)

as Megatron's own sampler does. The samples depend on the seed, the sequence length, the files and the number of
samples of the whole run (it decides how many epochs are shuffled), never on the ranks; so a run resumes exactly by the
number of samples it has consumed, also with another data-parallel size.

Under context parallelism all ranks of a group read the same samples and keep two pieces of each (`own_pieces`).

B micro-batch size, S sequence length.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fp4dist import env
from fp4dist.errors import ConfigError, DataError, DependencyError, Fp4DistError
from fp4dist.spec.run import PrepareConfig, RunConfig
from fp4dist.train.corpus import find_file
from fp4dist.train.prepare import describe_request, prepare, read_meta, valid_prefix
from fp4dist.train.token_files import (
    SURPLUS,
    TokenSide,
    check_sample_counts,
    check_token_files,
    token_sides,
)

__all__ = [
    "Batch",
    "Datasets",
    "build_datasets",
    "check_token_files",
    "ensure_prepared",
    "own_pieces",
    "train_iterator",
    "valid_batches",
]
log = logging.getLogger("fp4dist")
Sample = dict[str, Tensor]
_PREPARE_TIMEOUT = timedelta(days=1)  # how long ranks wait for the one that prepares
_NO_PAD = -1  # an id that no token has: nothing is padding


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the CPU.

    tokens, labels, position_ids    [B, S] int64; labels are the tokens one place on
    loss_mask                       [B, S] fp32; 1 where the loss counts
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor


@dataclass(frozen=True)
class Datasets:
    """What a run reads; `valid` is None when train.eval_samples is 0."""

    train: Dataset[Sample]
    valid: Dataset[Sample] | None


def ensure_prepared(config: RunConfig, *, rank0_first: bool = True) -> None:
    """Run data.prepare where token files are missing, in one process, while the others wait; errors reach every rank.

    rank0_first     rank 0 works first, then the first rank of each node looks again and works only where its node does
                    not see rank 0's files; False lets the first ranks of all nodes work at once (node-local disks)
    raises          DataError from prepare; DataError when files are there that another data.prepare made; ConfigError
                    when the model's vocabulary is too small for the one to train
    """
    plan = config.data.prepare
    if plan is None:
        return
    if plan.tokenizer is None and plan.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.prepare.vocab_size = {plan.vocab_size} is larger than model.vocab_size = {config.model.vocab_size},"
            " so some tokens would have no embedding; make the model's at least as large"
        )
    if not dist.is_initialized():
        assert env.world_size() == 1, "several processes must join torch.distributed before they share this work"
        _prepare_missing(config, plan)
        return
    waves = [env.local_rank() == 0] if not rank0_first else [dist.get_rank() == 0, env.local_rank() == 0]
    group: Any = dist.new_group(backend="gloo", timeout=_PREPARE_TIMEOUT)
    try:
        for works in waves:
            _agree(lambda: _prepare_missing(config, plan), works, group)
    finally:
        dist.destroy_process_group(group)


def _agree(work: Callable[[], None], works: bool, group: Any) -> None:
    """Run `work` where `works`; all ranks of `group` wait, and raise when one failed."""
    error: Fp4DistError | OSError | None = None
    if works:
        try:
            work()
        except (Fp4DistError, OSError) as e:
            error = e
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group)
    for found in errors:
        if found is not None:
            raise error or found


def _prepare_missing(config: RunConfig, plan: PrepareConfig) -> None:
    prefix = config.data.train[0]
    prefixes = [prefix, str(valid_prefix(prefix))] if plan.valid_fraction else [prefix]
    if all(Path(f"{p}{suffix}").is_file() for p in prefixes for suffix in (".bin", ".idx")):
        _check_made_so(prefix, plan)
    else:
        prepare(plan, prefix)


def _check_made_so(prefix: str, plan: PrepareConfig) -> None:
    """The files are there; refuse them when another plan made them (cheaply: sources by size, not by hash)."""
    meta = read_meta(prefix)
    if meta is None:  # made by other tools
        return
    if plan.tokenizer is not None and not find_file(plan.tokenizer).is_file():  # nor need the tokenizer's first copy
        plan = replace(plan, tokenizer=str(Path(prefix).with_name(meta["tokenizer"])))
    made, asked = dict(meta["request"]), describe_request(plan)
    sources = [find_file(name) for name in plan.sources]
    if all(path.is_file() for path in sources):  # the raw text need not be kept
        made["sources"] = [[s["name"], s["bytes"]] for s in meta["sources"]]
        asked["sources"] = [[path.name, path.stat().st_size] for path in sources]
    for key, value in asked.items():
        if made.get(key) != value:
            raise DataError(
                f"data.train = {prefix}: was prepared with {key} = {made.get(key)}, but data.prepare asks for {value};"
                f" name another prefix, or remove {prefix}.* to prepare it again"
            )


def build_datasets(config: RunConfig, dp_size: int) -> Datasets:
    """Build Megatron-core's datasets on every rank; rank 0 first writes the index caches, the others read them.

    Works with torch.distributed initialized (all ranks must call it) or not (one process). Raises DataError or
    ConfigError as check_token_files does, vocabulary aside, and ConfigError when the global batch does not divide.
    """
    _check_divides(config, dp_size)
    _import_index_builder()
    train, valid = token_sides(config)
    check_sample_counts(train, valid, config)
    sizes = [config.train.steps * config.train.global_batch_size, config.train.eval_samples, 0]
    megatron = _dataset_config(config, train, valid)
    if _is_first():
        _remove_damaged_caches(Path(str(megatron.path_to_cache)))
    train_set, valid_set, _ = _Builder(GPTDataset, sizes, lambda: True, megatron).build()
    if train_set is None or len(train_set) < sizes[0]:
        raise DataError(f"data.train: Megatron-core built {train_set and len(train_set)} samples of {sizes[0]}")
    return Datasets(cast("Dataset[Sample]", train_set), cast("Dataset[Sample] | None", valid_set))


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, usable by a single process without torch.distributed.

    The BlendedDataset of megatron-core 0.16 asks torch.distributed for the rank when it has to write its cache, also
    when there is none; without a process group it therefore keeps its (cheap) index in memory.
    """

    @staticmethod
    def build_generic_dataset(  # pyright: ignore[reportIncompatibleMethodOverride]  (the base says `cls`)
        dataset_class: Any, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """As the base class, with the cache of blends off when there is no process group."""
        if dataset_class is BlendedDataset and not dist.is_initialized():
            *rest, config = args
            config = copy.copy(config)
            config.path_to_cache = None
            args = (*rest, config)
        build = BlendedMegatronDatasetBuilder.build_generic_dataset
        return build(dataset_class, is_built_on_rank, synchronize_ranks, *args)


class _VocabularyFacts:
    """What GPTDataset asks of a tokenizer: sizes and ids, no text. Its identifiers are part of the name of each cache.

    The content of the `.idx` files is among them: Megatron names a cache after the path of the data alone, and would
    read wrong samples from new files under an old name.
    """

    def __init__(self, vocab_size: int, eod: int | None, files: dict[str, str]) -> None:
        self.vocab_size = vocab_size
        self.eod = eod
        self.pad = _NO_PAD
        self.unique_identifiers = {"class": type(self).__name__, "vocab_size": vocab_size, "eod": eod, "files": files}


def _dataset_config(config: RunConfig, train: TokenSide, valid: TokenSide | None) -> GPTDatasetConfig:
    """Megatron's configuration; `valid` comes from prefixes of its own, or by the split from those of `train`."""
    seq_length = config.model.seq_length
    separate = bool(config.data.valid)
    blends: dict[str, Any] = (
        {"blend_per_split": [_blend(train, seq_length), _blend(valid, seq_length) if valid else None, None]}
        if separate
        else {"blend": _blend(train, seq_length), "split": config.data.split}
    )
    sides = [side for side in (train, valid) if side is not None]
    meta = read_meta(train.blend.prefixes[0]) or {}
    facts = _VocabularyFacts(
        vocab_size=meta.get("vocab_size", config.model.vocab_size),
        eod=meta.get("eot_id"),
        files={index.prefix: index.sha256 for side in sides for index in side.indexes},
    )
    megatron = GPTDatasetConfig(
        random_seed=config.run.seed,
        sequence_length=seq_length,
        path_to_cache=config.data.cache_dir or f"{config.run_dir}/data_cache",
        tokenizer=cast(Any, facts),
        mid_level_dataset_surplus=SURPLUS,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **blends,
    )
    if megatron.split_matrix is not None:
        # The test part is never read; Megatron loops for ever over one without tokens.
        megatron.split_matrix[Split.test.value] = None  # type: ignore[call-overload]
        if valid is None:
            megatron.split_matrix[Split.valid.value] = None  # type: ignore[call-overload]
    return megatron


def _blend(side: TokenSide, seq_length: int) -> tuple[list[str], list[float] | None]:
    """Megatron's (prefixes, weights).

    Prefixes without weights get their numbers of samples as weights: Megatron's own rule, but without its limit of one
    epoch; within it the samples come in the same order.
    """
    return list(side.blend.prefixes), side.weights(seq_length)


def _check_divides(config: RunConfig, dp_size: int) -> None:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro * dp_size):
        raise ConfigError(
            f"train.global_batch_size = {batch} is not a multiple of train.micro_batch_size * data-parallel size"
            f" = {micro} * {dp_size}; change one of them or the number of processes"
        )


def _import_index_builder() -> None:
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError as e:
        raise DependencyError(
            f"megatron-core: its compiled helpers_cpp is missing ({e}); install the wheel, or in a source checkout run"
            " python -c 'from megatron.core.datasets.utils import compile_helpers; compile_helpers()'"
        ) from e


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _remove_damaged_caches(folder: Path) -> None:
    """Remove index caches that a killed run left half-written; Megatron takes any file of the right name for good."""
    for path in sorted(folder.glob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as e:
            log.warning("%s: removed, it is damaged (%s) and will be built again", path, e)
            path.unlink()


def own_pieces(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """What rank `cp_rank` of a context-parallel group trains on: [B, S] -> [B, S / cp_size].

    The sequence is cut into 2 * cp_size pieces, of which the rank gets number cp_rank and the one as far from the end,
    so that causal attention is equally much work for all; Megatron's order, which its RoPE expects.
    """
    if cp_size == 1:
        return batch

    def cut(tensor: Tensor) -> Tensor:
        pieces = tensor.chunk(2 * cp_size, dim=1)
        return torch.cat([pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]], dim=1)

    return Batch(*(cut(getattr(batch, f.name)) for f in fields(Batch)))


def train_iterator(
    datasets: Datasets,
    config: RunConfig,
    *,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int = 0,
    cp_rank: int = 0,
    cp_size: int = 1,
    shift: int = 0,
) -> Generator[Batch]:
    """The micro-batches of one data-parallel rank, from sample `consumed_samples` of the run to its last step.

    consumed_samples    of all ranks together: step * global_batch_size
    shift               samples that were left out so far: so much later ones are read; after the last come the first
    cp_rank, cp_size    place in the context-parallel group: this rank's pieces of the samples
    """
    _check_divides(config, dp_size)
    total = config.train.steps * config.train.global_batch_size
    micro = config.train.micro_batch_size
    if not 0 <= consumed_samples <= total or consumed_samples % (micro * dp_size):
        raise ConfigError(
            f"consumed_samples = {consumed_samples} must be in [0, train.steps * train.global_batch_size = {total}] and"
            f" a multiple of {micro * dp_size} (a micro-batch of every rank); resume from a checkpoint of this run"
        )
    starts = range(consumed_samples + dp_rank * micro, total, micro * dp_size)
    loader: DataLoader[Any] = DataLoader(
        datasets.train,
        batch_sampler=_MicroBatches([(start + shift) % total for start in starts] if shift else starts, micro),
        num_workers=config.data.num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # DataLoader draws a seed: not from the run's own random numbers
    )
    return _read_ahead(own_pieces(batch, cp_rank, cp_size) for batch in loader)


def _read_ahead(batches: Iterator[Batch]) -> Generator[Batch]:
    """The same batches, each read by a thread while the one before it is in use: a device need not wait for them."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


@dataclass(frozen=True)
class _MicroBatches:
    """Sample numbers of each micro-batch, as DataLoader's batch_sampler."""

    starts: Sequence[int]
    size: int

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self.size)) for start in self.starts)


def valid_batches(
    datasets: Datasets, config: RunConfig, *, dp_rank: int, dp_size: int, cp_rank: int = 0, cp_size: int = 1
) -> Iterator[Batch]:
    """The first train.eval_samples validation samples, shared out among the ranks; the same ones at every call.

    Every rank gets equally many batches of [B, S]. Places beyond eval_samples hold a sample whose loss_mask is 0, so
    sum(loss * mask) / sum(mask) over all batches and ranks is the mean over exactly eval_samples samples; a single
    batch may be masked completely.
    """
    if datasets.valid is None:
        return
    wanted, micro = config.train.eval_samples, config.train.micro_batch_size
    for start in range(0, wanted, micro * dp_size):
        first = start + dp_rank * micro
        batch = _collate([_valid_sample(datasets.valid, k, wanted) for k in range(first, first + micro)])
        yield own_pieces(batch, cp_rank, cp_size)


def _valid_sample(dataset: Dataset[Sample], number: int, wanted: int) -> Sample:
    if number < wanted:
        return dataset[number]
    sample = dataset[0]
    return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}


def _collate(samples: Sequence[Sample]) -> Batch:
    def stack(key: str) -> Tensor:
        return torch.stack([sample[key] for sample in samples])

    return Batch(stack("tokens"), stack("labels"), stack("loss_mask"), stack("position_ids"))
