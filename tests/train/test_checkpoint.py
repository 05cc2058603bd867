"""Checkpoints on disk: published in one rename, kept by rule, refused when they do not fit, harmless to read."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from fp4dist.errors import CheckpointError
from fp4dist.spec.load import config_hash, load_recipe, load_run, model_hash, recipe_hash
from fp4dist.spec.run import RunConfig
from fp4dist.train.checkpoint import (
    Manifest,
    Store,
    check_fits,
    describe,
    read_manifest,
    reading,
    vet_torch_dist,
    what_changes,
    writing,
)
from fp4dist.train.loop import _Training
from tests.train.tiny_run import tiny_run, with_overrides


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_run(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


def manifest_of(config: RunConfig, step: int, streak: int = 0) -> Manifest:
    return describe(config, step=step, dp=1, streak=streak, skipped=0, versions={"torch": "2"})


def save(store: Store, config: RunConfig, step: int, *, keep: int = 2, streak: int = 0, content: str = "x") -> Path:
    (store.begin(step) / "weights").write_text(content)
    return store.publish(manifest_of(config, step, streak), keep)


def names(store: Store) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


# -- publishing and keeping


def test_a_published_checkpoint_is_complete_and_the_latest(store: Store, config: RunConfig) -> None:
    assert store.newest() is None
    folder = save(store, config, 3)
    assert folder.name == "step_00000003"
    assert names(store) == ["latest", "step_00000003"]
    assert (folder / "state" / "weights").read_text() == "x"
    assert read_manifest(folder) == manifest_of(config, 3)
    assert store.newest() == folder
    assert (store.folder / "latest").read_text() == "step_00000003\n"


def test_nothing_is_visible_before_publish(store: Store, config: RunConfig) -> None:
    save(store, config, 1)
    (store.begin(2) / "weights").write_text("half")
    assert store.newest() == store.folder / "step_00000001"
    assert [folder.name for folder, _ in store.all()] == ["step_00000001"]


def test_clean_removes_unfinished_saves_and_puts_back_what_was_being_replaced(store: Store, config: RunConfig) -> None:
    save(store, config, 1)
    save(store, config, 2)
    store.begin(3)  # killed while writing
    (store.folder / ".tmp-latest").write_text("step_0000")
    (store.folder / "step_00000002").rename(store.folder / ".old-step_00000002")  # killed between two renames
    Store(store.folder).clean()
    assert names(store) == ["latest", "step_00000001", "step_00000002"]
    assert store.newest() == store.folder / "step_00000002"
    (store.folder / ".old-step_00000001").mkdir()  # killed after both renames
    store.clean()
    assert names(store) == ["latest", "step_00000001", "step_00000002"]
    Store(store.folder / "absent").clean()


def test_keep_counts_the_newest(store: Store, config: RunConfig) -> None:
    for step in (1, 2, 3, 4):
        save(store, config, step, keep=2)
    assert names(store) == ["latest", "step_00000003", "step_00000004"]
    save(store, config, 5, keep=0)  # the newest always stays
    assert names(store) == ["latest", "step_00000005"]


def test_the_last_good_checkpoint_outlives_its_turn(store: Store, config: RunConfig) -> None:
    save(store, config, 1, keep=1)
    for step in (2, 3, 4):
        save(store, config, step, keep=1, streak=step - 1)
    assert names(store) == ["latest", "step_00000001", "step_00000004"]
    assert store.last_good() == store.folder / "step_00000001"
    save(store, config, 5, keep=1)
    assert names(store) == ["latest", "step_00000005"]


def test_a_run_that_went_back_overwrites_its_abandoned_future(store: Store, config: RunConfig) -> None:
    for step in (2, 4, 6):
        save(store, config, step, keep=3)
    save(store, config, 4, keep=3, content="again")  # went back to step 2, came to 4 again
    assert (store.folder / "step_00000004" / "state" / "weights").read_text() == "again"
    assert store.newest() == store.folder / "step_00000004", "latest wins over a higher step"
    save(store, config, 5, keep=3)
    assert names(store) == ["latest", "step_00000002", "step_00000004", "step_00000005"]


def test_newest_survives_a_bad_latest(store: Store, config: RunConfig) -> None:
    save(store, config, 1)
    for text in ("step_00000009\n", "", "\n"):
        (store.folder / "latest").write_text(text)
        assert store.newest() == store.folder / "step_00000001"
    (store.folder / "latest").write_bytes(b"\xff\xfe\x00")
    assert store.newest() == store.folder / "step_00000001"
    (store.folder / "latest").unlink()
    assert store.newest() == store.folder / "step_00000001"


# -- manifests


def test_a_folder_without_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no manifest\.json; give a folder such as"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}', "\ufffd"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_damaged_newest_checkpoint_does_not_keep_a_run_from_another_one(store: Store, config: RunConfig) -> None:
    good, newest = save(store, config, 1), save(store, config, 2)
    (newest / "manifest.json").write_text("{")
    asked = with_overrides(config, "checkpoint", load=str(good))
    start = _Training._find_start(
        cast(Any, SimpleNamespace(config=asked, store=store, world=SimpleNamespace(dp_size=1)))
    )
    assert (start.folder, start.step) == (good, 1)
    with pytest.raises(CheckpointError, match=r"name another one in checkpoint.load, or remove this folder"):
        read_manifest(newest)


def test_what_a_checkpoint_of_another_run_changes_is_told(config: RunConfig) -> None:
    manifest = manifest_of(config, 3)
    assert what_changes(manifest, config) == []
    size, dtype = config.train.global_batch_size, {"fp32": "bf16", "bf16": "fp32"}[config.train.dtype]
    other = with_overrides(config, "run", seed=7)
    other = with_overrides(other, "train", global_batch_size=2 * size, dtype=dtype)
    other = dataclasses.replace(other, recipe=load_recipe("quartet2"))
    recipe, seed, samples, told = what_changes(manifest, other)
    assert recipe == f"the recipe changes from {config.recipe.name} to quartet2 (checkpoint.allow_recipe_change)"
    assert f"run.seed changes from {config.run.seed} to 7" in seed
    assert f"goes on with sample {6 * size}, and the checkpoint has {3 * size} behind it" in samples
    assert told == f"train.dtype changes from {config.train.dtype} to {dtype}"


def test_a_checkpoint_that_cannot_be_written_names_the_disk(tmp_path: Path) -> None:
    """One line without torch's tracebacks, and an OSError: other ranks may be waiting."""
    failure = CheckpointException("write", {3: (RuntimeError("no space\nin inline_container.cc"), StackSummary())})
    told = r"not written \(rank 3: RuntimeError: no space\); [\d.]+ GiB are free"
    with pytest.raises(OSError, match=told) as found, writing(tmp_path):
        raise failure
    assert "\n" not in str(found.value)
    for error in (RuntimeError("collective"), ValueError("ours")):
        with pytest.raises(type(error), match=str(error)), writing(tmp_path):
            raise error


def test_a_damaged_file_of_one_rank_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 and no more")  # a zip archive that was cut off
    with (
        pytest.raises(OSError, match=r"cannot be read \(RuntimeError: PytorchStreamReader .* use another"),
        reading(tmp_path),
    ):
        torch.load(tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="collective"), reading(tmp_path):
        raise RuntimeError("collective")


def test_an_unreadable_checkpoint_does_not_stop_retention(store: Store, config: RunConfig) -> None:
    save(store, config, 1)
    (store.folder / "step_00000001" / "manifest.json").write_text("{")
    save(store, config, 2, keep=1)
    assert names(store) == ["latest", "step_00000001", "step_00000002"]


# -- what fits


def test_a_manifest_from_before_vpp_cp_and_ep_is_read(store: Store, config: RunConfig) -> None:
    folder = save(store, config, 3)
    data = json.loads((folder / "manifest.json").read_text())
    for key in ("vpp", "cp", "ep"):
        del data[key]
    (folder / "manifest.json").write_text(json.dumps(data))
    assert read_manifest(folder) == manifest_of(config, 3)
    del data["tp"]
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"manifest\.json has format 1"):
        read_manifest(folder)


def test_hashes_do_not_change_when_fields_are_added() -> None:
    """Checkpoints of version 0.1 name these; a recipe or model that means the same must be taken for the same."""
    old = load_run("quickstart")
    assert (recipe_hash(old.recipe), model_hash(old.model)) == ("a95665735d99c693", "0eaf4556bc5216f3")
    assert config_hash(old) == "edcf66bbef62d32f"


def changed(manifest: Manifest, **values: Any) -> Manifest:
    return Manifest(**{name: values.get(name, getattr(manifest, name)) for name in Manifest.__slots__})


def fits(config: RunConfig, manifest: Manifest, *, dp: int = 1, own: bool = False) -> None:
    check_fits(Path("runs/a/checkpoints/step_00000001"), manifest, config, dp=dp, own=own)


def test_its_own_checkpoint_fits(config: RunConfig) -> None:
    fits(config, manifest_of(config, 1))


def test_another_model_is_refused_with_both_names_and_hashes(config: RunConfig) -> None:
    other = with_overrides(config, "model", num_layers=4, name="bigger")
    manifest = manifest_of(other, 1)
    with pytest.raises(CheckpointError, match=rf"model bigger \({manifest.model_hash}\), this run trains tiny"):
        fits(config, manifest)


def test_another_recipe_needs_the_flag(config: RunConfig) -> None:
    import dataclasses

    fp4 = dataclasses.replace(config, recipe=load_recipe("nvidia_nvfp4"))
    manifest = manifest_of(fp4, 1)
    pattern = rf"recipe nvidia_nvfp4 \({manifest.recipe_hash}\), this run uses bf16 \({recipe_hash(config.recipe)}\)"
    with pytest.raises(CheckpointError, match=pattern + r".*checkpoint\.allow_recipe_change: true"):
        fits(config, manifest)
    fits(with_overrides(config, "checkpoint", allow_recipe_change=True), manifest)


def test_the_other_engines_files_are_refused(config: RunConfig) -> None:
    deepspeed = with_overrides(config, "engine", kind="deepspeed")
    with pytest.raises(CheckpointError, match=r"engine megatron wrote it.*set engine\.kind: megatron"):
        fits(deepspeed, manifest_of(config, 1))


def test_deepspeed_shards_keep_their_layout(config: RunConfig) -> None:
    deepspeed = with_overrides(config, "engine", kind="deepspeed", zero_stage=2)
    manifest = manifest_of(deepspeed, 1)
    fits(deepspeed, manifest, own=True)
    for values, key in (
        ({"zero_stage": 1}, "zero_stage = 1"),
        ({"tp": 2}, r"parallel\.tp = 2"),
        ({"dp": 4}, "data parallel = 4"),
    ):
        with pytest.raises(CheckpointError, match=key):
            fits(deepspeed, changed(manifest, **values), own=True)


def test_deepspeeds_pickles_are_trusted_only_at_home_or_on_request(config: RunConfig) -> None:
    deepspeed = with_overrides(config, "engine", kind="deepspeed")
    manifest = manifest_of(deepspeed, 1)
    with pytest.raises(CheckpointError, match=r"full pickles.*checkpoint\.trusted: true"):
        fits(deepspeed, manifest)
    fits(deepspeed, manifest, own=True)
    fits(with_overrides(deepspeed, "checkpoint", trusted=True), manifest)


# -- reading without trust


class Bomb:
    """Runs a command when it is unpickled with full pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


def write_index(folder: Path, data: bytes, *, relative_path: str = "__0_0.distcp", extra: Any = None) -> None:
    """A torch_dist checkpoint with one pickled object."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    (folder / "__0_0.distcp").write_bytes(data)
    metadata = Metadata(
        state_dict_metadata={"random": BytesStorageMetadata()},
        storage_data={MetadataIndex("random"): _StorageInfo(relative_path, 0, len(data))},
    )
    if extra is not None:
        metadata.planner_data = extra
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_plain_objects_pass(tmp_path: Path) -> None:
    write_index(tmp_path, saved({"python": (3, (1, 2), None), "torch": torch.arange(3), "size": torch.Size([2])}))
    torch.save({"a": 1}, tmp_path / "common.pt")
    vet_torch_dist(tmp_path)


@pytest.mark.parametrize("place", ["index", "object", "common"])
def test_code_is_found_and_not_run(tmp_path: Path, place: str) -> None:
    fired = tmp_path / "fired"
    bomb = Bomb(fired)
    write_index(tmp_path, saved(bomb if place == "object" else 1), extra=bomb if place == "index" else None)
    if place == "common":
        torch.save({"a": bomb}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match="not the plain data that fp4dist writes"):
        vet_torch_dist(tmp_path)
    assert not fired.exists()


def test_members_of_enums_pass_as_older_pythons_pickle_them(tmp_path: Path) -> None:
    """Before 3.11.4 by getattr, as on Debian 12."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    holder = type("Holder", (), {"__reduce__": lambda self: (getattr, (_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))})
    write_index(tmp_path, saved(1), extra=holder())
    vet_torch_dist(tmp_path)


@pytest.mark.parametrize(
    "reduce", [(os.getcwd, ()), (np.array, ([1],)), (SimpleNamespace, ()), (getattr, (MetadataIndex, "__init__"))]
)
def test_the_index_admits_only_its_own_classes(tmp_path: Path, reduce: tuple[Any, ...]) -> None:
    holder = type("Holder", (), {"__reduce__": lambda self: reduce})
    write_index(tmp_path, saved(1), extra=holder())
    with pytest.raises(CheckpointError, match="does not belong in an index"):
        vet_torch_dist(tmp_path)


def test_an_object_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(saved(1))
    write_index(folder, saved(1), relative_path="../secret")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        vet_torch_dist(folder)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    write_index(tmp_path, saved({"a": torch.arange(100)}))
    data = (tmp_path / "__0_0.distcp").read_bytes()
    (tmp_path / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="it is damaged"):
        vet_torch_dist(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        vet_torch_dist(tmp_path)


def test_the_manifest_is_readable_text(store: Store, config: RunConfig) -> None:
    data = json.loads((save(store, config, 7) / "manifest.json").read_text())
    assert data["step"] == 7
    assert data["consumed_samples"] == 7 * config.train.global_batch_size
    assert data["noise_seed"] == config.run.seed
    assert data["versions"] == {"torch": "2"}
