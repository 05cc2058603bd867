"""One linear layer: three GEMMs, six operands, any process group; the rules that say which layer gets which recipe."""
