"""Lossless compression of BF16 language models after DFloat11 (arXiv 2504.11651).

Importing this makes transformers load compressed checkpoints: its `from_pretrained` knows `quant_method: df11` from then on.
"""

from df11 import autoload

__version__ = "0.1.0"

autoload.install()
