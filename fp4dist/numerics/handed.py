"""An amax that whoever wrote a tensor found on the way, kept with the tensor: its quantizer then need not look for it.

It is that of the very values of the tensor, never one of an earlier step; bits stay those of a quantizer that looks. It
holds for views of all elements (flattened, transposed), and is forgotten once anything writes into the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAME = "_fp4_amax"  # attribute: (amax, version of the tensor that it belongs to)


def hand_over(x: Tensor, amax: Tensor) -> Tensor:
    """`x`, whose max |x| is known to be `amax`: [] fp32 on its device, of the values as `x` stores them, NaN where one
    is. Raises ValueError for another form.
    """
    if amax.dim() or amax.dtype != torch.float32 or amax.device != x.device:
        raise ValueError(f"an amax is [] fp32 on {x.device}, got {list(amax.shape)} {amax.dtype} on {amax.device}")
    base = x._base  # views of a view are views of its base
    owner = base if base is not None and base.numel() == x.numel() else x
    setattr(owner, _NAME, (amax, owner._version))
    return x


def handed(x: Tensor) -> Tensor | None:
    """[] fp32 amax that was handed over with `x`, or with the tensor that it is a view of all elements of."""
    for owner in (x, x._base):
        found = None if owner is None else getattr(owner, _NAME, None)
        if owner is None or found is None:
            continue
        amax, version = found
        if version == owner._version and owner.numel() == x.numel():
            return amax
    return None
