"""What some models have beyond a Llama-style decoder: the planner knows its cost, our blocks cannot build it."""

from __future__ import annotations

from fp4dist.spec.frozen import frozen


@frozen
class Mla:
    """Multi-head latent attention: queries and keys/values pass through narrow projections."""

    q_rank: int
    kv_rank: int
    nope_dim: int  # of a query or key head, without position
    rope_dim: int
    v_dim: int


@frozen
class Mamba:
    """Mamba-2 blocks in place of attention in `layers` of the layers."""

    layers: int
    heads: int
    head_dim: int
    state: int
    groups: int


@frozen
class Beyond:
    """Deviations from a Llama-style decoder.

    mla            attention through latents
    mamba          state-space blocks; then a layer is one block (attention, Mamba or experts), not attention and MLP
    attention      number of attention layers, where a layer is one block
    latent         width in which the experts work, with a projection down and up around them; None: the hidden width
    gated          whether MLPs have a gate (SwiGLU); false: two matrices (squared ReLU)
    mtp            extra layers that predict further tokens
    """

    mla: Mla | None = None
    mamba: Mamba | None = None
    attention: int | None = None
    latent: int | None = None
    gated: bool = True
    mtp: int = 0

    def __post_init__(self) -> None:
        if (self.mamba is None) != (self.attention is None):
            raise ValueError("mamba and attention go together: a hybrid names how many layers are of each kind")
