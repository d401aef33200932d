"""lm-eval's own command line, with compressed checkpoints known to transformers:

python -m df11.lm_eval --model hf --model_args pretrained=DIRECTORY,mode=fused --tasks truthfulqa_mc1

mode and granularity are those of `DF11Config`. An uncompressed checkpoint is compressed for them while it is loaded.
"""

from __future__ import annotations

from typing import Any


def main() -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    from df11.hf import DF11Config

    plain = HFLM._create_model

    def create(self: HFLM, *args: Any, mode: str | None = None, granularity: str | None = None, **kwargs: Any) -> None:
        if mode or granularity:
            kwargs["quantization_config"] = DF11Config(mode=mode, granularity=granularity)
        plain(self, *args, **kwargs)

    HFLM._create_model = create
    cli_evaluate()


if __name__ == "__main__":
    main()
