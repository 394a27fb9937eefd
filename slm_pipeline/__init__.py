"""Depth-wise compression of language models: calibrate, merge, recover, evaluate."""

__version__ = "0.1.0"
