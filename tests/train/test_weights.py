"""Control of weights under both engines: any layout does what one rank does, and every state survives a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fp4dist.train.world import open_world
from tests.distributed import run_ranks
from tests.train.test_engines import build, interrupted_and_whole, save_with_two_load_with_one, train_all
from tests.train.tiny_run import tiny_run, write_counting_tokens

pytestmark = pytest.mark.distributed

NEAREST = {"format": "nvfp4", "outer": [1, 16]}
TURNED = {"format": "mxfp4", "scale": "ceil", "rotation": {"size": 32, "signs": "none"}}
AVERAGED = {"format": "nvfp4", "rounding": {"kind": "ema", "decay": 0.8, "after": 2}}
RESET = {"kind": "osci_reset", "start": 1, "every": 4, "window": 3, "threshold": 0.5}  # windows from steps 1 and 5 on
RAMPING = {"kind": "q_ramping", "every": 100, "step_ratio": 0.2, "stretch": 1, "longest": 3}
METHODS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "none": (NEAREST, []),
    "reset": (NEAREST, [RESET]),
    "share": (NEAREST, [RESET | {"share": 0.3}]),
    "turned": (TURNED, [RESET]),
    "turned_none": (TURNED, []),
    "probing": (NEAREST, [RAMPING | {"probe": 3}]),  # still at step 2
    "ramped": (NEAREST, [RAMPING | {"probe": 1}, {"kind": "cage", "strength": 3, "silence": 0.1}]),  # collecting there
    "coupled": (NEAREST, [{"kind": "cage", "strength": 3, "silence": 0.1, "form": "coupled"}]),
    "average": (AVERAGED, []),
}
SIX = ("optim.clip_grad=0", "optim.lr=4e-3", "model.hidden_size=64", "optim.schedule=constant")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_counting_tokens(tmp_path)
    for name, (w, controls) in METHODS.items():
        raw = {
            "name": name, "linears": {"fp4": {"fprop": {"w": w} if "rotation" not in w else {"x": w, "w": w}}},
            "rules": [{"roles": ["qkv", "proj", "fc1", "fc2"], "linear": "fp4"}], "weights": controls,
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(tmp_path)


def method(folder: str, name: str, *more: str) -> tuple[str, ...]:
    return (*SIX, f"recipe={folder}/{name}.yaml", *more)


def test_losses_do_not_depend_on_data_and_tensor_parallelism(folder: str) -> None:
    one = {name: method(folder, name) for name in ("none", "ramped", "coupled", "average")}
    two = {name: one[name] for name in ("ramped", "average")}
    two |= {f"{name}_tp2": (*one[name], "parallel.tp=2") for name in ("coupled", "average")}
    (alone,) = run_ranks(train_all, 1, folder, one, timeout=300)
    first, second = run_ranks(train_all, 2, folder, two, timeout=300)
    assert first == second, "ranks must agree on every number"
    for name, (found, _, _) in first.items():
        assert found == pytest.approx(alone[name.removesuffix("_tp2")][0], rel=1e-4), name
    for name in ("ramped", "coupled", "average"):
        found, without = alone[name][0][-1], alone["none"][0][-1]
        assert abs(found / without - 1) > 5e-4, f"{name} does nothing that this test could see"


def weights_after_a_window(folder: str, cases: dict[str, tuple[str, ...]]) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's weights after five steps; the first window was closed before the fifth update."""
    found = {}
    for name, overrides in cases.items():
        config = tiny_run(Path(folder), *overrides, name=name)
        with open_world(config) as world:
            engine, applied, batches = build(config, world)
            for step in range(1, 6):
                applied.set_step(step - 1, config.train.steps)
                engine.train_step(step, batches)
            engine._finish_gathers()
            weights = {t.site.path: t.module.weight for t in applied.targets if t.site.role != "head"}
            found[name] = {path: weight.detach().clone() for path, weight in weights.items()}
            engine.close()
    return found


def joined(path: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole weight of tensor-parallel ranks' shards."""
    pieces = [p.chunk(2) if "fc1" in path else (p,) for p in parts]  # gate and up are split each
    stretches = [piece for stretch in zip(*pieces, strict=True) for piece in stretch]
    return torch.cat(stretches, 1 if "proj" in path or "fc2" in path else 0)


def test_resets_do_not_depend_on_data_and_tensor_parallelism(folder: str) -> None:
    """They change no code, so that losses cannot tell; weights can, beside those of the same layout without a reset.

    Under `turned`, where inputs are quantized as well, tensor parallelism flips codes from the first step on, and the
    resets are alike in number alone.
    """
    one = {name: method(folder, name) for name in ("none", "reset", "share", "turned", "turned_none")}
    two = {name: one[name] for name in ("none", "share", "turned", "turned_none")}
    two |= {f"{name}_tp2": (*case, "parallel.tp=2") for name, case in one.items()}
    (alone,) = run_ranks(weights_after_a_window, 1, folder, one, timeout=300)
    first, second = run_ranks(weights_after_a_window, 2, folder, two, timeout=300)
    for name in two:
        method_name, layout = name.removesuffix("_tp2"), name[len(name.removesuffix("_tp2")) :]
        if "none" in method_name:
            continue
        base = "turned_none" if method_name == "turned" else "none"
        for path, whole in alone[method_name].items():
            wanted = whole - alone[base][path]
            if layout:
                found = joined(path, [rank[name][path] - rank[base + layout][path] for rank in (first, second)])
            else:
                assert torch.equal(first[name][path], second[name][path]), "data-parallel ranks hold the same"
                found = first[name][path] - first[base][path]
            moved = float((wanted.abs() > 2e-4).double().mean())
            different = float(((found - wanted).abs() > 2e-4).double().mean())
            assert moved > 0.02, f"{name} {path}: {moved:.2%}"
            if name == "turned_tp2":
                assert float((found.abs() > 2e-4).double().mean()) == pytest.approx(moved, rel=0.1), path
            else:
                assert different < 0.1 * moved, f"{name} {path}: {different:.2%} of {moved:.2%}"


def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_window(folder: str) -> None:
    cases = {name: method(folder, name) for name in ("reset", "probing", "turned")}
    cases["bf16"] = method(folder, "ramped", "train.dtype=bf16")
    for name in ("share", "ramped", "average"):
        cases[f"{name}_zero0"] = method(folder, name, "engine.kind=deepspeed", "engine.zero_stage=0")
    (results,) = run_ranks(interrupted_and_whole, 1, folder, cases, timeout=300)
    for name, (whole, parts) in results.items():
        assert parts == whole, name


def test_also_on_two_ranks(folder: str) -> None:
    cases = {name: method(folder, name) for name in ("share", "turned", "ramped", "average")}
    cases["pp2"] = method(folder, "share", "parallel.pp=2")
    cases["tp2"] = method(folder, "turned", "parallel.tp=2")
    for results in run_ranks(interrupted_and_whole, 2, folder, cases, timeout=300):
        for name, (whole, parts) in results.items():
            assert parts == whole, name


def loaded_tracks(folder: str, sources: list[str], overrides: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    """What the open window keeps, by key and weight, as whole local tensors after a checkpoint was read."""
    found = []
    for source in sources:
        config = tiny_run(Path(folder), *overrides, name="reader")
        with open_world(config) as world:
            engine, applied, _ = build(config, world)
            engine.load(Path(folder) / source / "checkpoints/step_00000003/state", step=3, same_layout=False)
            control = applied.optimizer
            keys = [key for key in control.slices if key != "weight_average"]
            found.append({f"{key} {n}": t.clone() for key in keys for n, t in control.shards.gather(key).items()})
            engine.close()
    return found


def test_an_open_window_can_be_read_in_another_layout(folder: str) -> None:
    """Two ranks save in the middle of a window, one reads: the same tensors, cut at other places."""
    data, tensor = method(folder, "share"), method(folder, "share", "parallel.tp=2")
    run_ranks(save_with_two_load_with_one, 2, folder, (data, tensor))
    (here,) = run_ranks(loaded_tracks, 1, folder, ["layout0", "layout1"], data)
    two_data = run_ranks(loaded_tracks, 2, folder, ["layout0"], data)
    two_tensor = run_ranks(loaded_tracks, 2, folder, ["layout1"], tensor)
    assert any(t.any() for key, t in here[0].items() if "osci_reset_way" in key)
    for key, whole in here[0].items():
        assert all(torch.equal(rank[0][key], whole) for rank in two_data), key
    for key, whole in here[1].items():
        parts = [rank[0][key] for rank in two_tensor]
        if parts[0].shape != whole.shape:
            assert torch.equal(joined(key, parts), whole), key
        elif whole.any():
            assert torch.equal(parts[0], whole), key
