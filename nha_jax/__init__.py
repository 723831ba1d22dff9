"""Native Hybrid Attention in JAX (arXiv 2510.07019)."""

__version__ = "0.1.0"
