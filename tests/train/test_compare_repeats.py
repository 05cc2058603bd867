"""tools/compare_repeats.py: fingerprints tell tensors apart, and the first difference of two repeats is named."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fp4dist.nn.apply import apply_recipe
from tests.tiny_llama import TinyLlama, make_tokens

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("compare_repeats", TOOLS / "compare_repeats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_repeats"] = module
    spec.loader.exec_module(module)
    return module


def test_fingerprints_see_every_byte_and_its_place(tool: ModuleType) -> None:
    x = torch.arange(1003, dtype=torch.bfloat16)
    alone = int(tool.fingerprint([x]))
    assert int(tool.fingerprint([x.clone()[:]])) == alone
    other, swapped = x.clone(), x.clone()
    other.view(torch.int16)[-1] ^= 1
    swapped[[0, 4]] = swapped[[4, 0]]
    changed = [other, swapped, x[1:], torch.cat((x, x[:1] * 0 - 0.0))]
    found = {alone, *(int(tool.fingerprint([t])) for t in changed)}
    assert len(found) == 5
    assert int(tool.fingerprint([x, other])) != int(tool.fingerprint([other, x]))


def test_operations_are_noted_in_their_order(tool: ModuleType) -> None:
    told = []
    for scale in (1.0, 1.0, 3.0):
        model = TinyLlama()
        notes = tool.Notes(on=True)
        notes.watch(apply_recipe(model, "quartet2", seed=1))
        (model(make_tokens()) * scale).backward()
        told.append(notes.told())
    assert told[0] == told[1]
    assert len(told[0]) > 20
    first = tool._operations({"operations": told[0]}, {"operations": told[2]})
    assert "dgrad.dy" in first, "forward is the same"
    assert "was given something else" in first


def row(**changes: Any) -> dict[str, Any]:
    given = [["a fprop.x", 1, 2], ["a fprop", 3, 4]]
    base = {"step": 1, "operations": given, "loss": 8.5, "gradients": {"w": 1, "v": 2}, "weights": {"w": 3}}
    return {**copy.deepcopy(base), "grad_norm": float("nan"), **changes}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"operations": []}, None),
        ({"operations": [["a fprop.x", 1, 2], ["a fprop", 3, 5]]}, "number 2 of 2, a fprop, which made something else"),
        ({"operations": [["a fprop.x", 0, 2], ["a fprop", 3, 5]]}, "2 operations, the first is number 1 of 2"),
        ({"loss": 8.5000001}, "all operations of the linears are equal; loss 8.5 and 8.5000001"),
        ({"gradients": {"w": 1, "v": 3}}, "1 of 2 gradients (v)"),
    ],
    ids=str,
)
def test_the_first_difference_is_named(tool: ModuleType, changed: dict[str, Any], words: str | None) -> None:
    found = tool.difference([row(), row(step=2)], [row(), row(step=2, **changed)])
    assert (found is None) == (words is None)
    if words is not None:
        assert words in found
        assert found.startswith("differ from step 2 on")
    assert "differ in their steps: 2, 1" in tool.difference([row(), row()], [row()])
