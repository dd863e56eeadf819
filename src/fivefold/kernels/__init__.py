"""Arithmetic that has, or will have, a fast path. Kernels import nothing of the rest of the project."""
