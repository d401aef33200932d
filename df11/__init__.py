"""Lossless compression of BF16 language models after DFloat11 (arXiv 2504.11651)."""

__version__ = "0.1.0"
