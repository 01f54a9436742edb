"""Reads one element of a value as a formula: what stands in a score, a bias or a mask at position (b, h, i, j)."""
