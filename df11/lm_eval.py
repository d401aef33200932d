"""lm-eval's own command line, with compressed checkpoints known to transformers:

python -m df11.lm_eval --model hf --model_args pretrained=DIRECTORY --tasks truthfulqa_mc1
"""

from __future__ import annotations

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # `python -m df11.lm_eval` has imported df11

    cli_evaluate()
