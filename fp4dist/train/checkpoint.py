"""Checkpoints on disk: published at once, kept by rule, refused when they do not fit, read without trust.

    <run folder>/checkpoints/step_00000100/manifest.json   what it is (written last)
                                           state/          the engine's files
                                           controllers.pt  what the recipe keeps from step to step, if it does
                            /latest                        the name of the newest one

A checkpoint is written into `.tmp-*` and renamed when it is complete; what a killed save left behind is removed at
the next start. Files are data, not programs: Megatron's `.metadata` is read by an unpickler that admits only
torch.distributed.checkpoint's own records, every other object with weights_only=True. DeepSpeed's files need full
pickle and are read only from the run's own folder (it wrote them) or with `checkpoint.trusted: true`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from fp4dist.errors import CheckpointError
from fp4dist.megatron.upstream import get_cuda_rng_tracker
from fp4dist.spec.load import config_hash, model_hash, recipe_hash
from fp4dist.spec.run import RunConfig

log = logging.getLogger("fp4dist")
FORMAT = 1
STATE = "state"
CONTROLLERS = "controllers.pt"
UNIVERSAL = "universal"  # inside STATE: what DeepSpeed's ds_to_universal.py made of a checkpoint; fits every layout
_UNIVERSAL_STAGES = {1: (1, 2), 2: (1, 2), 3: (3,)}  # ZeRO stage that wrote -> stages that can read
_MANIFEST, _LATEST, _TMP, _OLD = "manifest.json", "latest", ".tmp-", ".old-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds, without opening its tensors.

    step                steps behind it;  consumed_samples   samples behind it
    nonfinite_streak    skipped steps in a row up to here: 0 in a good checkpoint;  skipped_steps   of the whole run
    noise_seed          with `step` the whole state of the quantizers' noise
    started_from        the checkpoint.load of the run that wrote it
    vpp, cp, ep         1 in a manifest from before they existed
    """

    format: int = FORMAT
    step: int
    consumed_samples: int
    nonfinite_streak: int
    skipped_steps: int
    noise_seed: int
    engine: str
    zero_stage: int | None
    dtype: str
    tp: int
    pp: int
    dp: int
    model: str
    model_hash: str
    recipe: str
    recipe_hash: str
    config_hash: str
    started_from: str | None
    versions: dict[str, str]
    vpp: int = 1
    cp: int = 1
    ep: int = 1

    @property
    def good(self) -> bool:
        """Whether the last step before it was finite."""
        return self.nonfinite_streak == 0


def describe(config: RunConfig, *, step: int, dp: int, streak: int, skipped: int, versions: dict[str, str]) -> Manifest:
    """The manifest of a checkpoint of `config` after `step` steps."""
    deepspeed = config.engine.kind == "deepspeed"
    return Manifest(
        step=step,
        consumed_samples=step * config.train.global_batch_size,
        nonfinite_streak=streak,
        skipped_steps=skipped,
        noise_seed=config.run.seed,
        engine=config.engine.kind,
        zero_stage=config.engine.zero_stage if deepspeed else None,
        dtype=config.train.dtype,
        tp=config.parallel.tp,
        pp=config.parallel.pp,
        dp=dp,
        model=config.model.name,
        model_hash=model_hash(config.model),
        recipe=config.recipe.name,
        recipe_hash=recipe_hash(config.recipe),
        config_hash=config_hash(config),
        started_from=config.checkpoint.load,
        versions=versions,
        vpp=config.parallel.vpp,
        cp=config.parallel.cp,
        ep=config.parallel.ep,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; CheckpointError when it is not one."""
    try:
        data = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(
            f"checkpoint {folder}: no {_MANIFEST}; give a folder such as <run>/checkpoints/step_00000100"
        ) from e
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(
            f"checkpoint {folder}: {_MANIFEST} is unreadable ({e}); name another one in checkpoint.load, or remove this"
            " folder: a run goes on from the newest that is left"
        ) from e
    names = {f.name for f in fields(Manifest)}
    needed = {f.name for f in fields(Manifest) if f.default is MISSING or f.name == "format"}
    if not isinstance(data, dict) or data.get("format") != FORMAT or not needed <= set(data) <= names:
        found = data.get("format") if isinstance(data, dict) else None
        raise CheckpointError(
            f"checkpoint {folder}: {_MANIFEST} has format {found}, this version reads {FORMAT};"
            " use the fp4dist that wrote it"
        )
    return Manifest(**data)


def what_changes(manifest: Manifest, config: RunConfig) -> list[str]:
    """In words, what a run under `config` does otherwise than the one that wrote the checkpoint, and may."""
    told = []
    if manifest.recipe_hash != recipe_hash(config.recipe):
        told.append(
            f"the recipe changes from {manifest.recipe} to {config.recipe.name} (checkpoint.allow_recipe_change)"
        )
    if manifest.noise_seed != config.run.seed:
        told.append(
            f"run.seed changes from {manifest.noise_seed} to {config.run.seed}: samples come in another order, some of"
            " them again"
        )
    goes_on = manifest.step * config.train.global_batch_size
    if manifest.consumed_samples != goes_on:
        told.append(
            f"train.global_batch_size has changed: the run goes on with sample {goes_on}, and the checkpoint has"
            f" {manifest.consumed_samples} behind it"
        )
    if manifest.dtype != config.train.dtype:
        told.append(f"train.dtype changes from {manifest.dtype} to {config.train.dtype}")
    return told


def causes(error: BaseException) -> str:
    """What went wrong on each rank, a line each; torch's CheckpointException tells it in pages of traceback."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    found = [f"rank {rank}: {_first_line(e)}" for rank, (e, _) in failures.items()]
    return "; ".join(dict.fromkeys(found)) or _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside, a file that torch cannot read is an OSError in one line: it is one rank's own, others may wait for it."""
    try:
        yield
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "PytorchStreamReader" not in str(e):
            raise
        raise OSError(
            f"checkpoint {folder}: cannot be read ({causes(e)}); it is damaged: use another checkpoint"
            " (checkpoint.load), or remove its folder: a run goes on from the newest that is left"
        ) from e


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside, what cannot be written is an OSError that says what is free. It is no CheckpointError: other ranks may
    not know of it and wait, so that no group may be taken down.
    """
    try:
        yield
    except (CheckpointException, CheckpointingException, OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):  # torch.save's own; others are not ours
            raise
        free = shutil.disk_usage(folder).free / 2**30
        raise OSError(
            f"checkpoint in {folder}: not written ({causes(e)}); {free:.1f} GiB are free there: make room, or set"
            " run.dir to another disk, and start again: the run goes on from its last complete checkpoint"
        ) from e


def check_fits(folder: Path, manifest: Manifest, config: RunConfig, *, dp: int, own: bool) -> None:
    """Raise CheckpointError unless `config` may start from the checkpoint.

    own   it lies in this run's own folder and has its config hash
    """
    place = f"checkpoint {folder}"
    if manifest.model_hash != model_hash(config.model):
        raise CheckpointError(
            f"{place}: it holds model {manifest.model} ({manifest.model_hash}), this run trains {config.model.name}"
            f" ({model_hash(config.model)}); shapes must be equal: set model: to the checkpoint's, or start afresh"
        )
    if manifest.recipe_hash != recipe_hash(config.recipe) and not config.checkpoint.allow_recipe_change:
        raise CheckpointError(
            f"{place}: it was trained with recipe {manifest.recipe} ({manifest.recipe_hash}), this run uses"
            f" {config.recipe.name} ({recipe_hash(config.recipe)}); set checkpoint.allow_recipe_change: true to go on"
            " with the new recipe from its weights and optimizer state"
        )
    if manifest.engine != config.engine.kind:
        raise CheckpointError(
            f"{place}: engine {manifest.engine} wrote it, this run uses {config.engine.kind}, which has other files;"
            f" set engine.kind: {manifest.engine}"
        )
    if manifest.engine == "deepspeed":
        universal = (folder / STATE / UNIVERSAL).is_dir()
        _check_deepspeed(folder, manifest, config, dp=dp, own=own, universal=universal)


def _check_deepspeed(
    folder: Path, manifest: Manifest, config: RunConfig, *, dp: int, own: bool, universal: bool
) -> None:
    place, stage = f"checkpoint {folder}", config.engine.zero_stage
    sizes = ("tp", "pp", "vpp", "cp", "ep")
    here = {f"parallel.{key}": getattr(config.parallel, key) for key in sizes} | {"data parallel": dp}
    there = {f"parallel.{key}": getattr(manifest, key) for key in sizes} | {"data parallel": manifest.dp}
    here, there = {"engine.zero_stage": stage, **here}, {"engine.zero_stage": manifest.zero_stage, **there}
    sharded = stage == 3 and max(manifest.tp, config.parallel.tp) > 1  # which DeepSpeed joins for its own layers only
    if universal and stage in _UNIVERSAL_STAGES.get(manifest.zero_stage or 0, ()) and not sharded:
        here = {}
    for key, value in here.items():
        if value != there[key]:
            state = folder / STATE
            raise CheckpointError(
                f"{place}: written with {key} = {there[key]}, this run has {value}; DeepSpeed's shards cannot be cut"
                f" anew: use {there[key]} again, or, between ZeRO 1 and 2 and within ZeRO 3 at tp 1, make a universal"
                " checkpoint of them: python -m deepspeed.checkpoint.ds_to_universal"
                f" --input_folder {state / 'deepspeed'} --output_folder {state / UNIVERSAL}"
            )
    if not own and not config.checkpoint.trusted:
        raise CheckpointError(
            f"{place}: DeepSpeed's files are full pickles, which run code when they are read, and this folder is not"
            " the run's own; if you made them, set checkpoint.trusted: true"
        )


def write_controllers(state: Path, kept: dict[str, Any]) -> None:
    """Write AppliedRecipe.state_dict() into the checkpoint whose engine's files go to `state`. On one rank."""
    with (state.parent / CONTROLLERS).open("wb") as f:
        torch.save(kept, f)
        f.flush()
        os.fsync(f.fileno())


def read_controllers(folder: Path, recipe: str) -> dict[str, Any]:
    """What `write_controllers` wrote into a checkpoint of a recipe that keeps state; CheckpointError where it is not
    there or not plain data.
    """
    try:
        kept = _load_plain((folder / CONTROLLERS).read_bytes())
    except FileNotFoundError as e:
        raise CheckpointError(
            f"checkpoint {folder}: no {CONTROLLERS}, in which recipe {recipe} keeps its state from step to step; it is"
            " incomplete: use another checkpoint, or start afresh"
        ) from e
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError) as e:
        raise CheckpointError(
            f"checkpoint {folder}: {CONTROLLERS} is not the plain data that fp4dist writes ({type(e).__name__}: {e});"
            " use another checkpoint"
        ) from e
    missing = {"controllers", "phases", "optimizer"} - set(kept if isinstance(kept, dict) else ())
    if missing:
        raise CheckpointError(
            f"checkpoint {folder}: {CONTROLLERS} lacks {', '.join(sorted(missing))}; use another checkpoint"
        )
    return kept


class Store:
    """The checkpoints folder of one run. Its methods change files: call them on rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clean(self) -> None:
        """Remove what a killed save left, and put back a checkpoint that was being replaced."""
        if not self.folder.is_dir():
            return
        for old in self.folder.glob(f"{_OLD}*"):
            target = self.folder / old.name.removeprefix(_OLD)
            if target.exists():
                shutil.rmtree(old)
            else:
                old.rename(target)
        for leftover in self.folder.glob(f"{_TMP}*"):
            log.info("removing %s: an unfinished save", leftover)
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def begin(self, step: int) -> Path:
        """An empty folder for the engine's files of a checkpoint to be."""
        folder = self.folder / f"{_TMP}{_name(step)}"
        if folder.exists():
            shutil.rmtree(folder)
        (folder / STATE).mkdir(parents=True)
        return folder / STATE

    def publish(self, manifest: Manifest, keep: int) -> Path:
        """Make the folder of `begin` the newest checkpoint in one rename, then delete what `keep` no longer covers."""
        name = _name(manifest.step)
        tmp, final, old = self.folder / f"{_TMP}{name}", self.folder / name, self.folder / f"{_OLD}{name}"
        _write_text(tmp / _MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
        if final.exists():  # the run went back to an older checkpoint and came here again
            final.rename(old)
        tmp.rename(final)
        if old.exists():
            shutil.rmtree(old)
        _write_text(self.folder / f"{_TMP}{_LATEST}", name + "\n")
        os.replace(self.folder / f"{_TMP}{_LATEST}", self.folder / _LATEST)
        self._retain(manifest.step, keep)
        return final

    def all(self) -> list[tuple[Path, Manifest]]:
        """Readable checkpoints, lowest step first."""
        found = []
        for folder in sorted(self.folder.glob("step_*")):
            try:
                found.append((folder, read_manifest(folder)))
            except CheckpointError as e:
                log.warning("%s (left alone)", e)
        return found

    def newest(self) -> Path | None:
        """The checkpoint that `latest` names, else the one with the highest step."""
        try:
            named = self.folder / (self.folder / _LATEST).read_text(encoding="utf-8").strip()
            if (named / _MANIFEST).is_file():
                return named
        except (FileNotFoundError, UnicodeDecodeError):
            pass
        found = self.all()
        return found[-1][0] if found else None

    def last_good(self, before: int | None = None, every: int = 1) -> Path | None:
        """The newest checkpoint whose last step was finite.

        before   the last step that it may be of;  every   multiples of this alone: none that an interruption left
        """
        good = [
            folder
            for folder, manifest in self.all()
            if manifest.good and (before is None or manifest.step <= before) and manifest.step % every == 0
        ]
        return good[-1] if good else None

    def _retain(self, step: int, keep: int) -> None:
        """Keep the newest `keep` and the newest good one. Steps beyond `step` belong to a future that was given up."""
        found = self.all()
        found.sort(key=lambda item: (item[1].step <= step, item[1].step), reverse=True)
        good = next((folder for folder, manifest in found if manifest.good), None)
        for folder, _ in found[max(keep, 1) :]:
            if folder != good:
                shutil.rmtree(folder)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _member(kind: Any, name: str) -> Enum:
    """In the place of getattr, by which Python before 3.11.4 pickles members of enums: nothing else has attributes."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"getattr of {kind!r}, {name!r} does not belong in an index")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a torch.distributed checkpoint and nothing else."""

    _PLAIN = frozenset({("collections", "OrderedDict"), ("builtins", "set"), ("torch", "Size"), ("io", "BytesIO")})
    _FUNCTIONS = frozenset({("torch.serialization", "_get_layout")})

    def find_class(self, module: str, name: str) -> Any:
        """Admit plain containers, dtypes, and the dataclasses and enums of torch.distributed.checkpoint."""
        if (module, name) in self._PLAIN | self._FUNCTIONS:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (
            module.startswith(("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing."))
            and "." not in name
        ):
            found = super().find_class(module, name)
            if isinstance(found, type) and (hasattr(found, "__dataclass_fields__") or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")


def vet_torch_dist(folder: Path) -> None:
    """Raise CheckpointError unless every pickle in a torch_dist checkpoint holds data only.

    Megatron-core and torch read the index and the pickled objects of such a checkpoint with full pickle. This reads
    both first, restricted, so that what they read afterwards is known to be harmless. Tensors are weights_only anyway.
    """
    index = folder / ".metadata"
    try:
        with index.open("rb") as f:
            metadata = _MetadataUnpickler(f).load()
        records = metadata.storage_data
        objects = [
            key for key, value in metadata.state_dict_metadata.items() if type(value).__name__ == "BytesStorageMetadata"
        ]
        wanted = set(objects)
        for key, place in records.items():
            if key.fqn in wanted:
                _load_plain(_slice(folder, place))
        common = folder / "common.pt"
        if common.is_file():
            _load_plain(common.read_bytes())
    except (
        OSError,
        EOFError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
        RuntimeError,
    ) as e:
        raise CheckpointError(
            f"checkpoint {folder}: not the plain data that fp4dist writes ({type(e).__name__}: {e}); it is damaged, or"
            " made by someone else: use another checkpoint"
        ) from e


def _slice(folder: Path, place: Any) -> bytes:
    path = (folder / place.relative_path).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise pickle.UnpicklingError(f"{place.relative_path} leaves the folder")
    with path.open("rb") as f:
        f.seek(place.offset)
        return f.read(place.length)


def _load_plain(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def random_states() -> dict[str, Any]:
    """Every random generator of this process, as tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.tensor(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(_tracker().get_states()),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo time: put back what `random_states` gave."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(states["megatron"])


def _tracker() -> Any:
    """Megatron's named generators (tensor-parallel dropout draws from them)."""
    return get_cuda_rng_tracker()
