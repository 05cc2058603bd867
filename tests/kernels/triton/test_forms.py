"""What is kept for "all matrices of one layout" must not depend on which of them came first."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fp4dist.kernels.triton import eden, powers
from fp4dist.kernels.triton import quantize as module
from fp4dist.kernels.triton.launch import integer
from fp4dist.numerics.tensor import Want
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


@pytest.mark.parametrize("data", SPECS, ids=str)
def test_sources_of_one_form_share_its_constants(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, want = build(QuantSpec, data), Want(codes=True, carrier=torch.bfloat16)
    block_rows, multiple = spec.shape[0], max(spec.shape[1], spec.rotation.size if spec.rotation else 1)
    fitting = [s for s in sources() if s.shape[0] % block_rows == 0 and s.shape[1] % multiple == 0]
    assert len(fitting) > 50
    power = spec.format.scale.name == "e8m0"
    shared: dict[tuple[Any, str], Any] = {(module, "_FORMS"): {}, (module, "_AMAX"): {}, (powers, "_FORMS"): {}}
    compiled: dict[object, object] = {}

    def form(source: Any) -> Any:
        return powers._Form.of(source, spec, want, False) if power else module._Form.of(source, spec, want, False)

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


@pytest.mark.parametrize("data", [SPECS[0], EDEN], ids=["nearest", "eden"])
def test_what_is_kept_holds_no_matrix(data: dict[str, Any]) -> None:
    """Activations and gradients would stay for as many sizes as there are."""
    setup = eden._Setup if data is EDEN else module._Setup
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
