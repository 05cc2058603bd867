"""SPEED: faster ways to obtain the bits that `fp4dist.numerics` defines; each op is chosen once, loudly."""
