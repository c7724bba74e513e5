"""Compiled loops (numba) that run without the interpreter lock."""
