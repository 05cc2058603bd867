"""One linear layer: three GEMMs, six operands, any process group; and the rules that say which layer gets which recipe."""
