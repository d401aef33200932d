"""Tiny random models of the transformers classes that read or write text, made by the names of config fields alone."""

import copy
import inspect
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

HIDDEN, HEADS, KV, HEAD_DIM, VOCAB, LENGTH, RESERVED = 64, 4, 2, 16, 320, 20, 48
PATCH, IMAGE = 8, 32
LIMIT = 5_000_000
MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM")
# Fields of integers: the first expression that matches the whole name gives the value; ("max", n) keeps smaller defaults.
RULES: list[tuple[str, Any]] = [
    (r"conv_dim|intra_bottleneck_size", HIDDEN),
    (r"patch_embed_hidden_size", 3 * PATCH * PATCH),
    (r"indexer_kv_heads", 1),
    (r"type_vocab_size|additional_vocab_size|.*_groups?|topk_group|n_langs", ("max", 2)),
    (r".*(vocab_size|vocab_size_per_layer_input|ngram_vocab_size_base|group_vocab)", VOCAB),
    (r"num_(key_value|kv)_heads|kv_n_heads|swa_num_key_value_heads|num_query_groups", KV),
    (r"num_key_value_heads_.*|num_global_key_value_heads", KV),
    (r".*(num|n)_(\w+_)?heads|n_heads?|num_heads|.*attention_heads|.*_heads", HEADS),
    (r"attention_hidden_size", 2 * HIDDEN),
    (r"attention_head_dim", 2 * HEAD_DIM),
    (r"adapter_input_size|hidden_size_\w+|d_latents|hc_lowrank", HIDDEN),
    (r"(down|up)sampling_ratios", ("max", 2)),
    (r"context_size|max_pos_emb|.*round_up_to_multiple_of", ("max", 16)),
    (r"latent_query_num|num_query_tokens", 4),
    (r"num_latents|num_self_attends_per_block|num_filters", ("max", 4)),
    (r"channel_multiplier|num_res_blocks", 1),
    (r".*channels?", ("max", 64)),
    (r"index_topk|index_block_size|indexer_budget|index_kpool|indexer_compress_ratio", ("max", 4)),
    (r"index_topk_blocks", ("max", 1)),
    (r"max_source_positions", 16),
    (r"max_value_projector_patch_to_query_dict", 4),
    (r"audio_token_offset", VOCAB // 2 + 64),
    (r"image_token_offset|vocab_offset", VOCAB // 2),
    (r"mamba_(d_head|head_?dim)", 2 * HEAD_DIM),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"rotary_dim|.*attn_chunk_length|canvas_length", 8),
    (r".*temporal_patch_size", 2),
    (r".*codebook_dim", HIDDEN),
    (r".*codebook_size|num_embeddings", 64),
    (r"num_position_embeddings|num_patches|position_embedding_size|.*image_seq_length|num_image_tokens", (IMAGE // PATCH) ** 2),
    (r"mm_tokens_per_image|.*_tokens_per_image", 4),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r".*(head_dim|dim_head|d_head|d_kv|headdim|head_size|kv_channels|head_dim_\w+)", HEAD_DIM),
    (r".*num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts", ("max", 2)),
    (r"(num|n)_(expert_group|group)", 1),
    (r".*(num|n)_(\w+_)?experts|zero_expert_num", ("max", 4)),
    (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|dff|ffn_hidden_size|feed_forward_size|dim_ff|expert_dim)(_mlp)?", 96),
    (r"(moe|num)_layer_end_index", 3),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", ("max", 1)),
    (r".*(interval|sparse_step|frequency|every_n_layers|layer_period|layer_group_size|window_pattern)", ("max", 2)),
    (r".*layer_offset", ("max", 1)),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
    (r".*(num_hidden_layers|num_layers|_layers|n_layer|depth|depths|layers)", ("max", 2)),
    (r".*lora_rank|.*_rank", 32),
    (r".*(state_size|d_state)", 16),
    (r".*(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|emb_size|emb_dim|projection_dim|proj_dim)", HIDDEN),
    (r"dim|embedding_dim|hidden_sizes|lru_width|d_inner|d_embed|.*(output_size|out_dim|in_dim|output_dim|input_dim)", HIDDEN),
    (r"patch_size", PATCH),
    (r".*image_size", IMAGE),
    (r"(n|max)_(positions|seq_len|ctx)|.*max_position_embeddings|.*_positions|context_length", 128),
    (r".*sliding_window(_size)?|attention_window|local_attention", 8),
]
MEDIA = {
    "image": ("pixel_values", "flattened_patches", "image_patches"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values", "audio_input_ids"),
}
FIXED = {
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "axial_pos_embds_dim": [HIDDEN // 2, HIDDEN // 2],
    "axial_pos_shape": [8, 16],
    "default_language": "en_XX",
    "layer_types": ["full_attention", "conv"],
    "mlp_layer_types": ["dense", "sparse"],
    "vision_feature_layer": -1,
    "attn_layer_indices": [1],
    "image_grid_pinpoints": [[IMAGE, IMAGE]],
    "clip_qkv": 8.0,
    "qk_dim_factor": 1.0,
    "projector_patch_to_query_dict": {(IMAGE // PATCH) ** 2: 4},
    "vocabulary_map": {
        **{"<image>": 3, "<|extra_200|>": 41},
        **{f"IMGIMG{''.join(chr(65 + int(d)) for d in str(i))}Z": 64 + i for i in range(64)},
        **{f"<|visual token {i:06d}|>": 128 + i for i in range(64)},
    },
    "max_num_rows": 4,
}
LAYERS = r"num_hidden_layers|num_layers|n_layers?|layers|depth|(encoder|decoder)_layers|num_(encoder|decoder)_layers"
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": 3}
TOKEN = r".*_token_(id|index)|(mask|unk|pad|bos|eos)_index|im_\w+_id|image_patch_id"


def classes() -> list[type]:
    """The distinct classes that the installed transformers registers for the four kinds of language models."""
    names = set()
    for kind in MAPPINGS:
        for entry in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            names |= {entry} if isinstance(entry, str) else set(entry)
    found = {getattr(transformers, name, None) for name in names}
    return sorted((c for c in found if isinstance(c, type)), key=lambda c: c.__name__)


def _kept_layers(fields: dict[str, Any], each: int, least: int) -> dict[int, list[int]]:
    """For each number of layers in a config: the layers to keep, `each` of every kind and `least` in all."""
    counts = {v for k, v in fields.items() if re.fullmatch(LAYERS, k) and isinstance(v, int)}
    counts |= {len(v) for k, v in fields.items() if re.search("layer_types|layers_block_type", k) and isinstance(v, list | tuple)}
    kept = {}
    for count in counts:
        kinds: dict[Any, list[int]] = {}
        for i in range(count):
            kind = []
            for name, value in fields.items():
                if isinstance(value, list | tuple) and len(value) == count:
                    kind.append(str(value[i]) if list(value) != list(range(count)) else "")
                elif _is_index(name, value, count):
                    kind.append(i in value)
            kinds.setdefault(tuple(kind), []).append(i)
        chosen = [i for same in kinds.values() for i in same[:each]][:8]
        spare = [i for i in range(count) if i not in chosen]
        kept[count] = sorted(chosen + spare[: max(0, least - len(chosen))])
    return kept


def _is_index(name: str, value: Any, count: int) -> bool:
    named = isinstance(value, list | tuple) and re.search(r"layers|layer_ids|_idxs|_ind(ex|ic)es", name)
    return bool(named) and 0 < len(value) < count and all(type(v) is int and 0 <= v < count for v in value)


def _is_layered(value: Any, counts: dict[int, Any]) -> bool:
    return isinstance(value, list | tuple) and len(value) in counts and len(value) > 2


def _rope(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters that suit small heads."""
    new = {k: _rope(v, changes) if isinstance(v, dict) else v for k, v in value.items()}
    if "rope_type" in new:
        if new.get("partial_rotary_factor", 1) < 1:
            new["partial_rotary_factor"] = changes.get("partial", 0.5)
        if "mrope_section" in new or "mrope" in changes:
            half = int(HEAD_DIM * new.get("partial_rotary_factor", 1)) // 2
            new["mrope_section"] = [half * 3 // 8, half * 3 // 8, half - 2 * (half * 3 // 8)]
    return new


def _rule(name: str, changes: dict[str, Any]) -> Any:
    return next((r for pattern, r in [*changes.items(), *RULES] if re.fullmatch(pattern, name)), None)


def _small(value: Any, rule: Any) -> Any:
    """What the rule makes of a number or a list of numbers."""
    if isinstance(value, list | tuple):
        return type(value)(_small(v, rule) for v in value)
    if type(value) is not int or rule is None:
        return value
    return min(value, rule[1]) if isinstance(rule, tuple) else rule


def _shrunk(config: PreTrainedConfig, tokens: dict[str, int], changes: dict[str, Any]) -> PreTrainedConfig:
    """The same kind of config with small sizes."""
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_") and k not in ("id2label", "label2id")}
    kept = _kept_layers(fields, changes.get("each", 1), changes.get("count", 2))
    new: dict[str, Any] = {}
    for name, value in fields.items():
        rule = _rule(name, changes)
        integers = isinstance(value, list | tuple) and len(value) > 0 and all(type(v) is int for v in value)
        if name in changes:
            new[name] = changes[name]
        elif value is None and "fill" in changes and name in config.sub_configs and config.sub_configs[name].model_type:
            new[name] = _shrunk(config.sub_configs[name](), tokens, changes)
        elif name in FIXED and (value is not None or "fill" in changes) and not _is_layered(value, kept):
            new[name] = FIXED[name]
        elif isinstance(value, PreTrainedConfig):
            new[name] = _shrunk(value, tokens, changes)
        elif re.fullmatch(TOKEN, name) and (type(value) is int or isinstance(value, list) or name.split("_")[0] in MEDIA):
            new[name] = tokens.setdefault(re.sub("_index$", "_id", name), len(tokens))
        elif name == "pad_token_id" and "fill" in changes:
            new[name] = 0
        elif name == "rope_parameters" and value:
            new[name] = _rope(value, changes)
        elif re.fullmatch(LAYERS, name) and type(value) is int:
            new[name] = len(kept[value])
        elif _is_layered(value, kept):
            keep = kept[len(value)]
            if list(value) == list(range(len(value))):
                new[name] = list(range(len(keep)))
            else:
                new[name] = [_small(value[i], rule) for i in keep]
        elif kept and _is_index(name, value, max(kept)):
            keep = kept[max(kept)]
            new[name] = type(value)(keep.index(i) for i in value if i in keep)
        elif isinstance(value, dict) and value and all(type(v) is int for v in value.values()):
            new[name] = {k: min(v, 4) for k, v in value.items()}
        elif rule is not None and (type(value) is int or (integers and not (name == "patch_size" and len(value) > 2))):
            new[name] = _small(value, rule)
        elif rule is not None and value is None and "fill" in changes:
            new[name] = rule[1] if isinstance(rule, tuple) else rule
    varied = config.to_dict().get("per_layer_config")
    if varied:
        keep = kept[max(kept)]
        new["per_layer_config"] = {
            keep.index(int(i)): {k: _small(v, _rule(k, changes)) for k, v in values.items()}
            for i, values in varied.items()
            if int(i) in keep
        }
    return type(config)(**new)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"mrope": True},
    {r"(swa_)?num_(key_value|kv)_heads": HEADS},
    {"fill": True},
    {r".*head_dim": 2 * HEAD_DIM},
    {"partial": 1.0},
    {"each": 2},
    {"count": 4},
    {"is_decoder": True},
    {"intermediate_size": 4 * HIDDEN},
    {"vision_output_dim": 2 * HIDDEN},
    {"attention_hidden_size": HIDDEN},
    {"out_hidden_size": 4 * HIDDEN},
    {"count": 6},
    {"fill": True, r"(swa_)?num_(key_value|kv)_heads": HEADS},
    {"fill": True, "mrope": True},
    {"partial": 1.0, r"(swa_)?num_(key_value|kv)_heads": HEADS},
    {r"qk_rope_head_dim": 0, r"(swa_)?num_(key_value|kv)_heads": HEADS},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"vision_feature_layer": [-1, -2]},
    {"deepstack_layer_map": [[-1, 0], [-2, 1]], "downsample_rate": "1/2"},
    {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}}},
]


def _value(name: str, missing: int) -> Any:
    """What a config field gets that has no default."""
    if re.fullmatch(TOKEN, name):
        return RESERVED - 1 - missing
    rule = FIXED.get(name) or _rule(name, {})
    return rule[1] if isinstance(rule, tuple) else rule


def _attempts(cls: type) -> Iterator[tuple[PreTrainedConfig, int] | Exception]:
    """For each variant a config that builds and runs, with the number of its inputs, or the reason why not."""
    tried: set[str] = set()
    for changes in VARIANTS:
        missing: dict[tuple[type, str], Any] = {}
        while True:
            try:
                config = _shrunk(cls.config_class(), dict(TOKENS), changes)
                for part in _parts(config):
                    for (kind, name), value in missing.items():
                        if type(part) is kind:
                            setattr(part, name, value)
                text = config.to_json_string(use_diff=False)
                if text in tried:
                    break
                tried.add(text)
                with torch.device("meta"):
                    size = cls._from_config(config).num_parameters()
                if size > LIMIT:
                    raise ValueError(f"{size} parameters")
                yield config, len(inputs(_built(cls, config, 0)))
                break
            except AttributeError as error:
                value = _value(error.name or "", len(missing))
                key = (type(error.obj), error.name or "")
                if not isinstance(error.obj, PreTrainedConfig) or key in missing or value is None:
                    yield error
                    break
                missing[key] = value
            except Exception as error:
                yield error
                break


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def tiny_config(cls: type) -> PreTrainedConfig:
    """A config of the class with small sizes, of some variants the first that takes most kinds of inputs."""
    return copy.deepcopy(_tiny_config(cls))


@cache
def _tiny_config(cls: type) -> PreTrainedConfig:
    accepted = inspect.signature(cls.forward).parameters
    expected = 1 + sum(any(name in accepted for name in names) for names in MEDIA.values())
    best, count, first = None, 0, None
    for attempt in _attempts(cls):
        if isinstance(attempt, Exception):
            first = first or attempt
        elif attempt[1] > count:
            best, count = attempt
            if count >= expected:
                break
    if best is None:
        raise first or ValueError("no variant")
    return best


def _built(cls: type, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.normal_(0, 0.02)
    return model


def build(cls: type, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights in bfloat16, in evaluation mode."""
    return _built(cls, tiny_config(cls), seed)


def _field(config: PreTrainedConfig, names: str, default: Any) -> Any:
    """The first field of that name in the config or the configs in it."""
    for name, value in vars(config).items():
        if re.fullmatch(names, name) and value is not None:
            return value
    found = (_field(value, names, None) for value in vars(config).values() if isinstance(value, PreTrainedConfig))
    return next((value for value in found if value is not None), default)


def _forms(config: PreTrainedConfig, kind: str, accepted: Any) -> Iterator[dict[str, Tensor]]:
    """Pictures, films or sounds for two rows of text, in the layouts that models take."""
    vision = next((v for k, v in vars(config).items() if isinstance(v, PreTrainedConfig) and "vision" in k), config)
    patch, size = _field(vision, "patch_size", PATCH), _field(vision, ".*image_size", IMAGE)
    patch, size = (v if isinstance(v, int) else v[0] for v in (patch, size))
    side, time_ = size // patch, _field(vision, "temporal_patch_size|patch_temporal", 1)
    count, row = side * side, 3 * patch * patch
    spots = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1).repeat(2, 1, 1)
    grids = torch.tensor([[side, side]] * 2)
    if kind == "audio":
        bins = _field(config, "num_mel_bins|input_feat_size|n_mel_bins|feature_size|input_size|input_dim", 80)
        names = ("input_features_mask", "feature_attention_mask", "padding_mask", "audio_attention_mask", "input_values_mask")
        lengths = [(bins, 32), (64, 32), (128, 32), (bins, 160), (bins, 200)]
        for shape, length in [((2, n, t), t) for n, t in lengths] + [((2, t, n), t) for n, t in lengths]:
            yield {"input_features": torch.randn(shape), **dict.fromkeys(names, torch.ones(2, length, dtype=torch.long))}
        for shape in ((2, 256), (2, 1920), (2, 1, 256), (2, 1, 1920)):
            yield {"input_values": torch.randn(shape), **dict.fromkeys(names, torch.ones(2, shape[-1], dtype=torch.long))}
        return
    name, grid = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    flat = {grid: torch.tensor([[1, side, side]] * 2)}
    merge = torch.full((2,), _field(vision, "spatial_merge_size", 1))
    flat.update(dict.fromkeys(("image_merge_sizes", "video_merge_sizes"), merge))
    flat.update(dict.fromkeys(("image_grid_hw", "target_sizes", "target_sizes_videos"), grids))
    if any(key in accepted for key in flat):
        yield {name: torch.randn(2 * count, row * time_), **flat}
        yield {name: torch.randn(2 * count, 3, patch, patch), **flat}
    whole = {"image_sizes": torch.tensor([[size, size]] * 2), "pixel_mask": torch.ones(2, size, size, dtype=torch.long)}
    yield {name: torch.randn(2, 3, size, size), "high_res_pixel_values": torch.randn(2, 3, size, size)}
    yield {name: torch.randn(2, 3, size, size), **whole}
    for tiles in (1, 2, 4):
        mask = torch.ones(2, tiles, size, size, dtype=torch.long)
        yield {name: torch.randn(2, tiles, 3, size, size), "pixel_attention_mask": mask, **whole}
    tiles = _field(vision, "max_num_tiles", 4)
    ratios = {
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.long),
    }
    yield {name: torch.randn(2, 1, tiles, 3, size, size), **ratios}
    yield {name: torch.randn(2, 1, 3, size, size), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
    mask = torch.ones(2, count, dtype=torch.long)
    yield {name: torch.randn(2, count, row), "image_position_ids": spots, "spatial_shapes": grids, "pixel_attention_mask": mask}
    yield {name: torch.randn(1, 3, patch, 2 * count * patch), **flat}
    patches = torch.cat([spots.flip(-1) + 1.0, torch.randn(2, count, row)], -1)
    yield {"flattened_patches": patches, "attention_mask": mask}
    yield {"image_patches": patches[..., 2:]}


def _works(model: PreTrainedModel, x: dict[str, Tensor]) -> Exception | None:
    try:
        return None if outputs(model, [x]) else ValueError("no outputs")
    except Exception as error:
        return error


_KNOWN: dict[tuple[type, str], list[dict[str, Tensor]]] = {}


def inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Keyword inputs that together reach as many weights as possible, the text alone last where the model takes it."""
    key = type(model), model.config.to_json_string(use_diff=False)
    if key not in _KNOWN:
        _KNOWN[key] = _inputs(model)
    return [dict(x) for x in _KNOWN[key]]


def _inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(RESERVED, VOCAB, (2, LENGTH), generator=generator)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(ids)
    state = torch.randn(2, 8, HIDDEN, generator=generator).to(model.dtype)
    spans = torch.arange(6).view(1, 3, 2).repeat(2, 1, 1)
    base = {"input_ids": ids, "attention_mask": ones, "decoder_input_ids": ids.flip(1)}
    more = {
        "encoder_hidden_states": state,
        "cross_attention_states": state,
        "bbox": zeros[..., None].repeat(1, 1, 4),
        "global_attention_mask": zeros.index_fill(1, torch.arange(2), 1),
        "qformer_input_ids": ids,
        "protein_input_ids": ids,
        "protein_attention_mask": ones,
        "input_shape_ids": ids,
        "input_pronunciation_ids": ids,
        "entity_ids": ones[:, :3],
        "entity_position_ids": spans,
        "input_ids": ids.repeat(_field(config, "num_codebooks", 1), 1),
        "inputs": ids,
    }
    taken: list[dict[str, Tensor]] = []
    error: Exception | None = None
    for x in ({**base, **more}, base, {k: v for k, v in {**base, **more}.items() if k != "encoder_hidden_states"}):
        x = {k: v for k, v in x.items() if k in accepted}
        failure = _works(model, x)
        error = error or failure
        if failure is None:
            taken.append(x)
            break
    for kind, names in MEDIA.items():
        if any(name in accepted for name in names):
            token = getattr(config, f"{kind}_token_id", None) or _field(config, f"{kind}_token_(id|index)|{kind}_patch_id", None)
            found, failure = _with_media(model, {**(taken[-1] if taken else {**more, **base})}, kind, token)
            error = error or failure
            taken[:0] = [found] if found is not None else []
    if not taken:
        raise error or ValueError("no inputs")
    return taken


def _with_media(
    model: PreTrainedModel, text: dict[str, Tensor], kind: str, token: int | None
) -> tuple[dict | None, Exception | None]:
    """Inputs with a picture, film or sound in each row, or the last reason why none works."""
    accepted = inspect.signature(model.forward).parameters
    failure = None
    torch.manual_seed(0)
    for form in _forms(model.config, kind, accepted):
        if not any(name in accepted and name in form for name in MEDIA[kind]):
            continue
        form = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in form.items()}
        counts, told = [1, 4, 16, 17] if token is not None else [0], None
        while counts:
            count = counts.pop(0)
            x = dict(text)
            if token is not None:
                x["input_ids"] = torch.cat([text["input_ids"][:, :2], torch.full((2, count), token), text["input_ids"][:, 2:]], 1)
                x["attention_mask"] = torch.ones_like(x["input_ids"])
                x["mm_token_type_ids"] = (x["input_ids"] == token).long() * (1 + list(MEDIA).index(kind))
            x["image_embeds_position_mask"] = torch.zeros_like(x["input_ids"]).index_fill(1, torch.arange(2, 6), 1)
            x["image_attention_mask"] = torch.ones_like(x["input_ids"])[..., None]
            x = {k: v for k, v in {**x, **form}.items() if k in accepted and not k.endswith(("hidden_states", "attention_states"))}
            error = _works(model, x)
            if error is None:
                return x, None
            if str(error) == str(failure):
                break
            failure = error
            if told is None and (told := re.search(r"features:? *(\d+)", str(error))):
                total = int(told[1]) // 2
                counts = [n for n in (total, total // HIDDEN, *range(2, 40)) if 0 < n < 200]
            elif told and "features" not in str(error):
                break  # the count is right, something else is not
    return None, failure


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Cache):
        return
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def outputs(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> list[Tensor]:
    """All floating tensors of the outputs; the seed is the same each time, as some models draw noise."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [tensor for x in inputs for tensor in _tensors(model(**x))]


def generated(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> Tensor | None:
    """Three new tokens after the text, or None where the model does not generate."""
    if not model.can_generate():
        return None
    text = {k: v.clone() for k, v in inputs[-1].items() if not k.startswith("decoder_")}  # some write into their inputs
    if model.config.is_encoder_decoder:
        text["decoder_start_token_id"] = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # diffusion draws even so
        made = model.generate(**text, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1)
    return made if isinstance(made, Tensor) else made.sequences


def unreached(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> list[str]:
    """The matrices on which no output depends."""
    model = type(model)._from_config(model.config, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    inputs = [{k: v.float() if v.is_floating_point() else v for k, v in x.items()} for x in inputs]
    try:
        for x in inputs:
            sum((t.float() * torch.randn(t.shape)).sum() for t in _tensors(model(**x)) if t.requires_grad).backward()
    except RuntimeError:  # no way backward: each matrix is tried in turn
        model.zero_grad()
    left = [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and p.numel() and (p.grad is None or not p.grad.any())]
    if not left:
        return []
    before, missed = outputs(model, inputs), []

    def same() -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, outputs(model, inputs), strict=True))

    originals = [parameter.data.clone() for _, parameter in left]
    for _, parameter in left:
        parameter.data.normal_(0, 1)
    if same():
        return [name for name, _ in left]
    for (_, parameter), original in zip(left, originals, strict=True):
        parameter.data.copy_(original)
    for name, parameter in left:  # those that only choose, as the routers of experts do
        kept = parameter.data.clone()
        parameter.data.normal_(0, 1)
        if same():
            missed.append(name)
        parameter.data.copy_(kept)
    return missed


def _check(cls: type) -> str:
    model = build(cls)
    x = inputs(model)
    before = outputs(model, x)
    size, notes = model.num_parameters(), f"{len(x)} inputs"
    try:
        generated(model, x)
    except Exception as error:
        notes += f", GENERATE {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    try:
        missed = unreached(model, x)
        notes += f", {len(missed)} unreached" + (f" ({', '.join(missed[:4])})" if missed else "")
    except Exception as error:
        notes += f", GRADIENT {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = cls.from_pretrained(folder, dtype=torch.bfloat16)
        if not all(torch.equal(a, b) for a, b in zip(before, outputs(again, x), strict=True)):
            notes += ", RELOAD differs"
    except Exception as error:
        notes += f", RELOAD {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}"
    return f"{size:,} parameters, {notes}"


def main() -> None:
    """Tries all classes, or those named."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)

    def expired(*_: Any) -> None:
        raise KeyboardInterrupt("too slow")

    signal.signal(signal.SIGALRM, expired)
    chosen = [c for c in classes() if c.__name__ in sys.argv[1:] or len(sys.argv) == 1]
    good = 0
    for cls in chosen:
        start = time.perf_counter()
        signal.alarm(60)
        try:
            line = "ok " + _check(cls)
            good += 1
        except (Exception, KeyboardInterrupt) as error:
            if len(sys.argv) > 1:
                import traceback

                traceback.print_exc()
            line = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            signal.alarm(0)
        print(f"{cls.__name__}: {line}, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{good} of {len(chosen)} work")


if __name__ == "__main__":
    main()
