"""The program: data, engines, checkpoints, metrics and the loop that joins them."""
