"""RMSNorm and LayerNorm: torch's bits, Megatron's constructor, the mark that sequence parallelism needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp4dist.errors import ConfigError
from fp4dist.megatron import norm as norms
from fp4dist.megatron.norm import LayerNorm, Norm, RMSNorm, fused_norm
from fp4dist.megatron.upstream import TransformerConfig, without_known_warnings


def config(**changes: Any) -> TransformerConfig:
    fields: dict[str, Any] = dict(
        num_layers=1, hidden_size=64, num_attention_heads=4, normalization="RMSNorm", use_cpu_initialization=True
    )
    with without_known_warnings():
        return TransformerConfig(**(fields | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_bit_for_bit(dtype: torch.dtype) -> None:
    ours = RMSNorm(config=config(params_dtype=dtype), hidden_size=64, eps=1e-5)
    theirs = torch.nn.RMSNorm(64, eps=1e-5, dtype=dtype)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    outputs, gradients = [], []
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
        x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = norm(x)
        y.backward(torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(2)).to(dtype))
        outputs.append(y)
        gradients.append((x.grad, norm.weight.grad))
    assert outputs[0].dtype == dtype
    assert torch.equal(*outputs)
    for ours_grad, theirs_grad in zip(*gradients, strict=True):
        assert torch.equal(ours_grad, theirs_grad)


def test_marks_its_weight_for_sequence_parallelism() -> None:
    assert not RMSNorm(config(), 64).weight.sequence_parallel
    parallel = RMSNorm(config(tensor_model_parallel_size=2, sequence_parallel=True), 64)
    assert parallel.weight.sequence_parallel
    assert parallel.returns_residual is False
    assert list(parallel.state_dict()) == ["weight"]


def test_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(ConfigError, match=r"normalization = 'LayerNorm'"):
        RMSNorm(config(normalization="LayerNorm"), 64)
    with pytest.raises(ConfigError, match="zero_centered_gamma"):
        RMSNorm(config(layernorm_zero_centered_gamma=True), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_equals_torch_bit_for_bit(dtype: torch.dtype) -> None:
    ours: Any = Norm(config(normalization="LayerNorm", params_dtype=dtype), hidden_size=64, eps=1e-5)
    theirs = torch.nn.LayerNorm(64, eps=1e-5, dtype=dtype)
    assert isinstance(ours, LayerNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    results = []
    for norm in (ours, theirs):
        for i, parameter in enumerate(norm.parameters()):
            parameter.data.copy_(torch.randn(64, generator=torch.Generator().manual_seed(i)))
        x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        y = norm(x)
        y.backward(torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(3)).to(dtype))
        results.append((y, x.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)


def test_norm_is_what_the_config_says() -> None:
    parallel = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    assert isinstance(Norm(config(), 64), RMSNorm)
    made: Any = Norm(config(normalization="LayerNorm", **parallel), 64)
    assert made.weight.sequence_parallel
    assert made.bias.sequence_parallel
    with pytest.raises(ConfigError, match=r"normalization = 'L2Norm': fp4dist\.megatron builds RMSNorm and LayerNorm"):
        Norm(config(normalization="L2Norm"), 64)
    with pytest.raises(ConfigError, match="zero_centered_gamma"):
        Norm(config(normalization="LayerNorm", layernorm_zero_centered_gamma=True), 64)


def test_transformer_engine_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice only: Transformer Engine itself needs a GPU and was not run."""
    assert fused_norm() is Norm or torch.cuda.is_available()
    engine = SimpleNamespace(TENorm=type("TENorm", (), {}))
    monkeypatch.setattr(norms, "transformer_engine", lambda: engine)
    assert fused_norm() is engine.TENorm
