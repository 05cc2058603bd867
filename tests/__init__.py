"""Tests, one folder for each package of fp4dist."""
