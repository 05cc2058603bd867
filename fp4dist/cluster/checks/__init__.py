"""Preflight's checks by subject. Each takes facts of one node, or of all, and yields faults."""
