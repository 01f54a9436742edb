"""Benchmarks: this backend beside eager, Inductor, FlexAttention, SDPA and Liger (`python -m xfcompile bench`)."""
