"""Proof on the owner's machine that its kernels give the bits of `fp4dist.numerics`, and how fast: one report file.

Start it with `python -m fp4dist.kernels.verify`.
"""
