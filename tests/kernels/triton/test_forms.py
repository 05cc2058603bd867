"""What is kept for "all matrices of one layout" must not depend on which of them came first."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fp4dist import numerics
from fp4dist.kernels.triton import eden, filters, noise, power_forms, powers, quantize_forms, signs
from fp4dist.kernels.triton import quantize as module
from fp4dist.kernels.triton.launch import integer
from fp4dist.numerics.tensor import BlockScaledTensor, Want
from fp4dist.spec.blocks import Hadamard
from fp4dist.spec.build import build
from fp4dist.spec.recipe import QuantSpec

SPECS = (
    {"format": "nvfp4"},
    {"format": "nvfp4", "block": [16, 16]},
    {"format": "nvfp4", "scale": "four_over_six"},
    {"format": "mxfp4"},
    {"format": "mxfp4", "scale": "quest", "rotation": {"size": 32, "signs": "none"}},
)
EDEN = {"format": "nvfp4", "rounding": "eden", "rotation": {"size": 128, "signs": "fresh"}}
ROWS = (1, 16, 48, 128, 160, 4096)
COLUMNS = (128, 256, 384, 512, 768, 1024, 1152, 1536, 2048, 2816, 3072, 5632)


def sources() -> list[Any]:
    """Rows and transposes of many sizes, strides and alignments."""
    found = []
    for rows, columns in itertools.product(ROWS, COLUMNS):
        whole = torch.empty(rows, columns + 24, dtype=torch.bfloat16)
        for x in (torch.empty(rows, columns, dtype=torch.bfloat16), whole[:, :columns], whole[:, 1 : columns + 1]):
            found.append(module._Source.of(x))
            found.append(module._Source.of(torch.empty(columns, rows, dtype=torch.bfloat16).t()))
    return found


def specialization(source: Any) -> tuple[object, ...]:
    """What Triton compiles a kernel for, of this source's arguments."""
    tensor, rest = source.tensor, (source.stride, *source.shape)
    return tensor.dtype, tensor.data_ptr() % 16 == 0, *map(integer, rest)


KEPT = ((quantize_forms, "_FORMS"), (quantize_forms, "_AMAX"), (power_forms, "_FORMS"))


@pytest.mark.parametrize("data", SPECS, ids=str)
def test_sources_of_one_form_share_its_constants(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, want = build(QuantSpec, data), Want(codes=True, carrier=torch.bfloat16)
    block_rows, multiple = spec.shape[0], max(spec.shape[1], spec.rotation.size if spec.rotation else 1)
    fitting = [s for s in sources() if s.shape[0] % block_rows == 0 and s.shape[1] % multiple == 0]
    assert len(fitting) > 50
    power = spec.format.scale.name == "e8m0"
    shared: dict[tuple[Any, str], Any] = {(of, name): {} for of, name in KEPT}
    compiled: dict[object, object] = {}

    def form(source: Any) -> Any:
        return (power_forms if power else quantize_forms).Form.of(source, spec, want, False)

    for source in [*fitting, *reversed(fitting)]:
        for place in shared:
            monkeypatch.setattr(*place, {})
        alone = form(source)
        for place, kept in shared.items():
            monkeypatch.setattr(*place, kept)
        found = form(source)
        assert found.constants == alone.constants, source.shape
        if not power:
            assert found.amax.constants == alone.amax.constants, source.shape
            assert compiled.setdefault(found.amax.form, specialization(source)) == specialization(source)
        assert compiled.setdefault(found.form, specialization(source)) == specialization(source), source.shape


@pytest.mark.parametrize("data", [SPECS[0], SPECS[3], EDEN], ids=["nearest", "power of two", "eden"])
def test_what_is_kept_holds_no_matrix(data: dict[str, Any]) -> None:
    """Activations and gradients would stay for as many sizes as there are."""
    setup: Any = {id(SPECS[3]): powers, id(EDEN): eden}.get(id(data), module)._Setup  # type: ignore[attr-defined]
    spec = build(QuantSpec, data)
    want = Want(codes=True, carrier=torch.bfloat16)
    for turned in (False, True):
        x = torch.empty(128, 256, dtype=torch.bfloat16)
        found = setup.of(x.t() if turned else x, spec, want)[0]
        assert setup.of(x.t() if turned else x, spec, want)[0] is found, "not kept"
        memory = x.untyped_storage().data_ptr()
        holders = [t for t in gc.get_objects() if type(t) is torch.Tensor and t is not x]
        assert not [t for t in holders if t.untyped_storage().data_ptr() == memory]


def test_sources_of_one_form_are_read_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """MS-EDEN reads rows as words of two bf16, unless their stride or address is odd."""
    spec = build(QuantSpec, EDEN)
    whole = torch.empty(64, 1026, dtype=torch.bfloat16)
    odd = torch.empty(64 * 1025 + 8, dtype=torch.bfloat16)
    matrices = [whole[:, :1024], whole[:, 2:], odd[8:].view(64, 1025)[:, :1024], odd[: 64 * 1025].view(64, 1025)[:, 1:]]
    monkeypatch.setattr(eden, "_FORMS", {})
    seen: dict[object, object] = {}
    for x in matrices:
        source = module._Source.of(x)
        words, stride = eden._words(source)
        read = words.dtype, words.data_ptr() % 16 == 0, integer(stride), *map(integer, source.shape)
        assert seen.setdefault(eden._Form.of(source, spec).name, read) == read
    assert len({read[0] for read in seen.values()}) == 2  # type: ignore[index]


ROTATED = {"format": "mxfp4", "scale": "quest", "rotation": {"size": 32, "signs": "fixed", "mask": 12345}}
PLAIN = tuple(build(QuantSpec, data) for data in (SPECS[3], SPECS[4], ROTATED))
WANTS = (
    Want(), Want(mask=True), Want(carrier=torch.bfloat16), Want(False, torch.bfloat16), Want(False, torch.float8_e5m2),
    Want(False, torch.float8_e4m3fn), Want(False, torch.float8_e5m2, spread=torch.zeros(2, dtype=torch.int32)),
)  # fmt: skip


def matrices() -> Iterator[torch.Tensor]:
    """Of one size: by rows and by columns, of two types, with other strides and addresses."""
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.empty(264, 264, dtype=dtype)
        for x in (torch.empty(256, 256, dtype=dtype), whole[:256, :256], whole[:256, 1:257], whole[1:257, :256]):
            yield from (x, x.t())


def turned_codes() -> Iterator[tuple[BlockScaledTensor, bool]]:
    """(codes, whether their rotation has signs) of one size: in other words, blocks, bases and under other factors."""
    x = torch.randn(256, 256)
    for data in (SPECS[3], {"format": "mxfp4", "block": [32, 32]}, {"format": "mxfp4", "block": [1, 16]}, ROTATED):
        q = numerics.quantize(x, build(QuantSpec, data))
        q = replace(q, global_scale=module._constant(1.0, x.device))
        yield q, False
        yield q, True
        yield replace(q, global_scale=torch.ones(())), False
        odd = torch.empty(q.codes.numel() + 4, dtype=torch.uint8)[4:].view(q.codes.shape)
        yield replace(q, codes=odd.copy_(q.codes)), False
        scales = torch.empty(q.scales.numel() + 1, dtype=torch.uint8)[1:].view(q.scales.shape)
        yield replace(q, scales=scales.copy_(q.scales)), False
        wide = torch.empty(q.codes.shape[0], q.codes.shape[1] + 2, dtype=torch.uint8)[:, : q.codes.shape[1]]
        yield replace(q, codes=wide.copy_(q.codes)), False


def test_one_look_finds_the_setup_of_the_very_same_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of power-of-two quantizers: whatever changes a constant, an argument or what is written makes a setup new."""
    given: list[tuple[Any, ...]] = [(x, spec, want) for x in matrices() for spec in PLAIN for want in WANTS]
    given += [
        (q, spec, want, (q.rotation, flips), True)
        for q, flips in turned_codes()
        for spec in PLAIN
        for want in WANTS[::3]
    ]
    kept: dict[object, Any] = {}
    for one in [*given, *reversed(given)]:
        monkeypatch.setattr(powers, "_SETUPS", {})
        alone, memory = powers._Setup.of(*one)
        monkeypatch.setattr(powers, "_SETUPS", kept)
        found, read = powers._Setup.of(*one)
        assert found.form is alone.form
        assert read.data_ptr() == memory.data_ptr()
        assert [getattr(found, f.name) for f in fields(found)] == [getattr(alone, f.name) for f in fields(alone)]
    assert 100 < len(kept) < len(given)  # equal ones do share


def test_gradients_that_share_a_launch_are_compiled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `filter_by_mask`: all that Triton specializes on, and every constant."""
    monkeypatch.setattr(filters, "_BY_MASK", {})
    monkeypatch.setattr(filters, "_RUNS", {})
    compiled: dict[int, object] = {}
    rotations = (None, Hadamard(size=32, signs="none"), Hadamard(), Hadamard(signs="fresh"))
    rows = [x for x in matrices() if x.stride(1) == 1] + [torch.empty(256, 240), torch.empty(48, 256)]
    for x, rotation, adds in itertools.product([*rows, *reversed(rows)], rotations, (False, True)):
        bits = torch.empty(x.shape[0], x.shape[1] // 8 + 1, dtype=torch.uint8)
        for kept in (bits[:, 1:].contiguous(), bits.flatten()[1 : 1 + x.numel() // 8].view(x.shape[0], -1)):
            for out in (torch.empty(x.shape), torch.empty(x.shape, dtype=torch.bfloat16)):
                found = filters._ByMask.of(x, kept, out, rotation, adds)
                same = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in (x, kept, out))
                all_of = (
                    same,
                    *map(integer, (x.stride(0), *x.shape)),
                    x.shape[1] % 128,
                    rotation and rotation.size,
                    adds,
                )
                assert compiled.setdefault(id(found.run), all_of) == all_of
                assert (found.stride, found.shape) == (x.stride(0), tuple(x.shape))
                assert (found.signs is None) == (rotation is not None and rotation.signs == "fresh")
    assert len(compiled) > 20


def test_what_is_kept_of_an_evaluation_is_no_inference_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd refuses to save a tensor that was made in inference mode."""
    monkeypatch.setattr(powers, "_SETUPS", {})
    for made in (module._constant, signs._given, noise._unread, powers._thirty_seconds):
        made.cache_clear()
    with torch.inference_mode():
        turned = next(q for q, _ in turned_codes() if q.rotation == 32)
        for spec in PLAIN:
            powers._Setup.of(torch.empty(256, 256), spec, Want())
            powers._Setup.of(turned, spec, Want(), (32, True), True)
    parts = [getattr(setup, f.name) for setup in powers._SETUPS.values() for f in fields(setup)]
    held = [t for part in parts for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, torch.Tensor)]
    assert len(held) > 10
    assert not any(t.is_inference() for t in held)
