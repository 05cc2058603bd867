"""WHAT: number formats, quantizers, recipes and runs as frozen data. Knows nothing of torch, devices or ranks."""
