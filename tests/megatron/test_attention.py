"""Core attention: Megatron's own result and gradients, without the score matrix; clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dist.errors import ConfigError
from fp4dist.megatron.attention import SdpaAttention, core_attention
from fp4dist.megatron.upstream import AttnMaskType, TransformerConfig, without_known_warnings
from tests.distributed import megatron_groups, run_ranks

SEQUENCE, BATCH, HEADS, WIDTH = 24, 2, 4, 16


def config(groups: int = HEADS, **changes: Any) -> TransformerConfig:
    fields: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    with without_known_warnings():
        return TransformerConfig(**(fields | changes))


def attention(kind: type = SdpaAttention, mask: AttnMaskType = AttnMaskType.causal, **changes: Any) -> Any:
    return kind(config=config(**changes), layer_number=1, attn_mask_type=mask, attention_type="self")


def inputs(groups: int = HEADS, queries: int = SEQUENCE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, BATCH, HEADS, WIDTH), (SEQUENCE, BATCH, groups, WIDTH), (SEQUENCE, BATCH, groups, WIDTH)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def causal_mask() -> Tensor:
    return torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)


@pytest.mark.distributed
def test_equals_megatrons_own_attention() -> None:
    for case, differences in run_ranks(compare_with_megatron, 1)[0].items():
        assert max(differences) < 2e-6, case


def compare_with_megatron() -> dict[Any, list[float]]:
    """Largest differences of output and gradients in fp32, for each number of groups and each mask."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    found = {}
    blocks = causal_mask()
    blocks[..., 12:, :12] = True  # two documents
    with megatron_groups():
        for groups in (HEADS, 2, 1):
            for name, ours_mask, theirs_mask in (("causal", None, causal_mask()), ("documents", blocks, blocks)):
                results = []
                for kind, mask in ((SdpaAttention, ours_mask), (DotProductAttention, theirs_mask)):
                    tensors = inputs(groups)
                    y = attention(kind, groups=groups)(*tensors, mask)
                    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
                    results.append([y.detach(), *(t.grad for t in tensors)])
                assert results[0][0].shape == (SEQUENCE, BATCH, HEADS * WIDTH)
                found[groups, name] = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return found


@pytest.mark.distributed
def test_pieces_of_a_sequence_equal_the_whole() -> None:
    """Output and gradients of two context-parallel ranks, put together, are those of one; a mask is refused."""
    ranks = run_ranks(attend_in_pieces, 2)
    for case in ranks[0]:
        assert max(max(rank[case]) for rank in ranks) < 2e-6, case


def attend_in_pieces() -> dict[Any, list[float]]:
    """Largest differences of this rank's output and gradients from its pieces of the whole ones."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    found = {}
    with megatron_groups(cp=2):
        for groups in (HEADS, 2, 1):
            for kind in (AttnMaskType.causal, AttnMaskType.no_mask):
                whole = inputs(groups)
                expected = attention(mask=kind, groups=groups)(*whole, None)
                weights = torch.linspace(-1, 1, expected.numel()).view_as(expected)
                expected.backward(weights)
                tensors = [expected.detach(), weights, *whole, *(t.grad for t in whole)]
                batch = {str(i): t.detach().transpose(0, 1).contiguous() for i, t in enumerate(tensors)}
                pieces = [t.transpose(0, 1) for t in get_batch_on_this_cp_rank(batch).values()]
                own = [t.contiguous().requires_grad_() for t in pieces[2:5]]
                module = attention(mask=kind, groups=groups, context_parallel_size=2)
                y = module(*own, None)
                y.backward(pieces[1])
                pairs = zip([y.detach(), *(t.grad for t in own)], [pieces[0], *pieces[5:]], strict=True)
                found[groups, kind.name] = [float((a - b).abs().max()) for a, b in pairs]
        with pytest.raises(ConfigError, match=r"attention_mask with parallel\.cp > 1"):
            module(*own, causal_mask())
    return found


def test_full_attention_and_single_query() -> None:
    query, key, value = inputs()
    full = attention(mask=AttnMaskType.no_mask)(query, key, value, None)
    assert torch.equal(full, attention()(query, key, value, None, attn_mask_type=AttnMaskType.no_mask))
    last = attention()(query[-1:], key, value, None)  # one step of decoding
    torch.testing.assert_close(last, attention()(query, key, value, None)[-1:])


def test_softmax_scale_and_layer_scaling() -> None:
    query, key, value = inputs()
    kind = dict(layer_number=3, attn_mask_type=AttnMaskType.causal, attention_type="self")
    usual = SdpaAttention(config(), **kind)(query, key, value, None)
    assert torch.equal(usual, SdpaAttention(config(), softmax_scale=WIDTH**-0.5, **kind)(query, key, value, None))
    layer_scaled = config(apply_query_key_layer_scaling=True)
    assert torch.equal(usual, SdpaAttention(layer_scaled, **kind)(query, key, value, None))


@pytest.mark.distributed
def test_dropout_draws_from_the_model_parallel_state() -> None:
    same_state, other_draw, evaluated = run_ranks(drop, 1)[0]
    assert same_state
    assert other_draw
    assert evaluated


def drop() -> tuple[bool, bool, bool]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    with megatron_groups():
        dropping, tensors = attention(attention_dropout=0.5), inputs()
        before = torch.get_rng_state()
        first, second = (dropping(*tensors, None) for _ in range(2))
        kept = torch.equal(before, torch.get_rng_state())
        model_parallel_cuda_manual_seed(1234)
        assert get_cuda_rng_tracker().is_initialized()
        again = dropping(*tensors, None)
        evaluated = torch.equal(dropping.eval()(*tensors, None), attention()(*tensors, None))
        return kept and torch.equal(first, again), not torch.equal(first, second), evaluated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"packed_seq_params": object()}, "packed_seq_params"),
        ({"attention_bias": torch.zeros(1)}, "attention_bias"),
        ({"attn_mask_type": AttnMaskType.arbitrary}, "arbitrary needs attention_mask"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention()(*inputs(), None, **arguments)


def test_refuses_a_causal_mask_that_is_not_square() -> None:
    with pytest.raises(ConfigError, match="8 queries over 24 keys"):
        attention()(*inputs(queries=8), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window_size": (8, 0)}, "window_size"),
        ({"softmax_type": "learnable"}, "softmax_type"),
    ],
)
def test_refuses_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attention(**changes)


def test_the_choice_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fp4dist"):
        chosen = core_attention()
    assert ("scaled_dot_product_attention" in caplog.text) == (chosen is SdpaAttention)
    assert "core attention" in caplog.text
