"""Step-by-step decoding against transformers' own generate, and models that are made compressed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from df11 import hf, modules, runtime
from df11.tensors import CompressedTensor
from experiments import losslessness
from experiments.decoding import Decoder
from experiments.harness import timing

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(3, 13).view(2, 5)


def geometry(tied: bool) -> dict[str, object]:
    """With a scaled embedding and two kinds of layers, whose buffers must be made too."""
    names = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return {**names, **SIZES, **HEADS, "tie_word_embeddings": tied}


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_made_compressed_decodes_as_the_original(tied: bool) -> None:
    original = hf.build(geometry(tied), 1, "cpu")
    model = hf.build(geometry(tied), 1, "cpu", modules.compress_own_)
    assert all(isinstance(p, CompressedTensor) and p.is_compressed for p in model.parameters() if p.dim() > 1)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    runtime.attach(model)
    ids = Decoder(original, 2, 20).tokens(IDS, 8)
    assert torch.equal(Decoder(model, 2, 20).tokens(IDS, 8), ids)
    # transformers' generate has another cache, so sums in another order: in bf16 some processors' would decide for other ids.
    original.float()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(original.generate(IDS, **settings)[:, IDS.shape[1] :], Decoder(original, 2, 20).tokens(IDS, 8))


def test_a_second_prefill_starts_anew() -> None:
    decoder = Decoder(hf.build(geometry(True), 1, "cpu"), 2, 20)
    assert torch.equal(decoder.tokens(IDS, 8), decoder.tokens(IDS, 8))


@pytest.mark.parametrize(("model_type", "architecture"), [("llama", "LlamaForCausalLM"), ("gemma3_text", "Gemma3ForCausalLM")])
def test_the_step_before_a_capture_is_taken_back(monkeypatch: pytest.MonkeyPatch, model_type: str, architecture: str) -> None:
    """With a graph that is played: the step runs once, then each replay runs it."""
    monkeypatch.setattr(timing, "graph", lambda work: work() or work)
    model = hf.build({"model_type": model_type, "architectures": [architecture], **SIZES, **HEADS}, 1, "cpu")
    decoder = Decoder(model, 2, 20, "graph")
    assert torch.equal(decoder.tokens(IDS, 8), Decoder(model, 2, 20).tokens(IDS, 8))
    assert not any(layer.is_sliding for layer in decoder.cache.layers)


def test_attention_is_one_that_repeats_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = hf.build(geometry(True), 1, "cpu"), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **named: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    Decoder(model, 2, 20).tokens(IDS, 3)
    assert len(seen) == 2 * 3 and not any(seen)
    losslessness.outputs(model, SimpleNamespace(seed=0, device=SimpleNamespace(name="cpu")))  # type: ignore[arg-type]
    assert len(seen) > 2 * 3 and not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_weights_depend_on_the_seed() -> None:
    a, b, c = (hf.build(geometry(False), seed, "cpu").lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_cannot_be_decoded_is_refused() -> None:
    model = hf.build(geometry(True) | {"sliding_window": 8}, 1, "cpu")
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        Decoder(model, 1, 20, "graph")
    with pytest.raises(ValueError, match="eager, graph"):
        Decoder(model, 1, 20, "fast")
