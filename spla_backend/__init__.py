"""SPLA, block Sparse Plus Linear Attention (arXiv 2601.22379), as an out-of-tree attention backend for vLLM."""

__version__ = "0.1.0"
