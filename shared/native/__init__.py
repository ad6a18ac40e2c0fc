"""Kernels in C, and what compiles them. Everything works without them, slower."""
