from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.config import register

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tokenizer() -> Any:
    """257 tokens: a byte is one, and `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", *alphabet])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **special)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Composes the config as run.py does, for the tiny model, with results in a temporary folder."""

    register()

    def build(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", ["model=tiny", f"results_dir={tmp_path}/results", *overrides])

    return build
