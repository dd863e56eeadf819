"""Timing: one attention step of a layer (`kernels`), a whole decoding step of a model (`decode`), and what this
machine is (`machine`)."""
