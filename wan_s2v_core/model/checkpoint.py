"""The only home of foreign spellings: which file is what, and how its tensor and setting names become ours.

Layouts read: the official folder of Wan2.2-S2V-14B and ComfyUI's single files; VAE and umT5 also in diffusers' and
transformers' names.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..config import UNUSED, S2VModelConfig
from ..errors import CheckpointError, ConfigError, shown, shown_path
from ..io.weights import WeightEntry, Weights

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]
"""(regular expression, replacement) pairs; all of them are applied, in order."""
Shape = Callable[[str], tuple[int, ...]]
"""Name in our network -> shape of that tensor in the file; KeyError if the file has none."""


def rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def has(shape: Shape, name: str) -> bool:
    try:
        shape(name)
    except KeyError:
        return False
    return True


MOST_LAYERS = 512
"""Of any kind in any of the networks. The released ones have up to 40."""


def count_layers(shape: Shape, pattern: str) -> int:
    """How many of `pattern` with 0, 1, 2 ... there are.

    Raises:
        CheckpointError: if no network has so many.
    """
    layers = next(index for index in count() if not has(shape, pattern.format(index)))
    if layers > MOST_LAYERS:
        raise CheckpointError(f"it has {layers:,} layers {pattern}; at most {MOST_LAYERS} are read. Use another file.")
    return layers


def check_counts(counts: Mapping[str, int], most: int = MOST_LAYERS) -> None:
    """Raises CheckpointError if a config.json asks for more of something than is built."""
    for name, value in counts.items():
        if value > most:
            raise CheckpointError(
                f"config.json sets {name}={shown(value)}; at most {most:,} are built. Use the released config.json."
            )


# --- the DiT -----------------------------------------------------------------------------------------------------

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
DIT_RULES: Rules = (  # ours -> official
    (r"^pose_embedding\.", "cond_encoder."),
    (r"^segment_embedding\.", "trainable_cond_mask."),
    (r"^time_projection\.", "time_projection.1."),
    (r"^motion_packer\.near\.", "frame_packer.proj."),
    (r"^motion_packer\.middle\.", "frame_packer.proj_2x."),
    (r"^motion_packer\.far\.", "frame_packer.proj_4x."),
    (r"^audio_encoder\.layer_weights$", "casual_audio_encoder.weights"),
    (r"^audio_encoder\.padding_token$", "casual_audio_encoder.encoder.padding_tokens"),
    (r"^audio_encoder\.local_in\.", "casual_audio_encoder.encoder.conv1_local.conv."),
    (r"^audio_encoder\.global_in\.", "casual_audio_encoder.encoder.conv1_global.conv."),
    (r"^audio_encoder\.middle\.", "casual_audio_encoder.encoder.conv2.conv."),
    (r"^audio_encoder\.last\.", "casual_audio_encoder.encoder.conv3.conv."),
    (r"^audio_encoder\.global_out\.", "casual_audio_encoder.encoder.final_linear."),
    (r"^stack\.injectors\.(\d+)\.modulation\.", r"audio_injector.injector_adain_layers.\1.linear."),
    (r"^stack\.injectors\.(\d+)\.attention\.", r"audio_injector.injector.\1."),
    (r"^stack\.blocks\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.cross_attention\.", r"\1.cross_attn."),
    (r"^(blocks\.\d+)\.cross_norm\.", r"\1.norm3."),
    (r"^(blocks\.\d+)\.feed_forward\.(gate\.|bias$)", r"\1.ffn.\2"),
    (r"^(blocks\.\d+)\.feed_forward\.(experts\.\d+\.|)up\.", r"\1.ffn.\g<2>0."),
    (r"^(blocks\.\d+)\.feed_forward\.(experts\.\d+\.|)down\.", r"\1.ffn.\g<2>2."),
    (r"^((?:blocks|audio_injector)\..*)\.out\.", r"\1.o."),
    (r"^head\.out\.", "head.head."),
)
DIT_SETTINGS = {  # ours -> official config.json
    "width": "dim",
    "feed_forward_width": "ffn_dim",
    "heads": "num_heads",
    "blocks": "num_layers",
    "latent_channels": "in_dim",
    "pose_channels": "cond_dim",
    "text_width": "text_dim",
    "text_tokens": "text_len",
    "time_width": "freq_dim",
    "audio_width": "audio_dim",
    "audio_tokens": "num_audio_token",
    "injected_blocks": "audio_inject_layers",
    "modulates_audio": "enable_adain",
    "packs_motion": "enable_framepack",
    "zero_timestep": "zero_timestep",
    "eps": "eps",
}
EXPERT_SETTINGS = {name: name for name in ("num_experts", "top_k", "gate_over", "gate_probes")}
"""More of them, in the config.json of a model with experts only. None is released; the spelling is ours."""
FIXED_SETTINGS = {  # what other values in an official config.json would change is not built
    "add_last_motion": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "framepack_drop_mode": "padd",
    "adain_mode": "attn_norm",
    "patch_size": (1, 2, 2),
    "qk_norm": True,
    "cross_attn_norm": True,
    "window_size": (-1, -1),
}


MOST_TEXT_TOKENS = 4096
"""That a DiT may read of a prompt, each step anew; the released one reads 512."""
ADD_TOP_K = "Add how many experts a token sees, as it was trained."


def dit_name(ours: str) -> str:
    """The official name of one of the DiT's parameters."""
    return rename(ours, DIT_RULES)


def check_kind(name: str, value: Any, kind: type) -> None:
    """Whether a setting is what it should be: whole numbers above or at 0, numbers, words, switches or lists of such.

    Raises:
        CheckpointError: naming setting and value.
    """
    fits = {
        int: type(value) is int and 0 <= value < 2**31,
        float: type(value) in (int, float) and 0 <= value < 1,
        bool: type(value) is bool,
        str: type(value) is str,
        list: type(value) in (list, tuple) and all(type(item) is int and item >= 0 for item in value),
    }
    if not fits[kind]:
        wanted = {int: "a whole number", float: "a small number", bool: "true or false", str: "a word"}
        what = wanted.get(kind, "a list of whole numbers")
        raise CheckpointError(
            f"config.json sets {name}={shown(repr(value))}; {what} is expected. Use the released config.json."
        )


def dit_config(official: Mapping[str, Any]) -> S2VModelConfig:
    """An official config.json as ours; what it leaves out is the 14B model's.

    Raises:
        CheckpointError: if it describes another model, or a variant that is not built.
    """
    kind = str(official.get("model_type", "s2v"))
    if kind != "s2v" or "S2V" not in str(official.get("_class_name", "S2V")):
        raise CheckpointError(
            f"config.json describes model_type={shown(repr(kind))} ({shown(official.get('_class_name'))}), not S2V. "
            "Point to the folder of Wan2.2-S2V-14B."
        )
    for name, needed in FIXED_SETTINGS.items():
        value = official.get(name, needed)
        if (tuple(value) if isinstance(value, list) else value) != needed:
            raise CheckpointError(
                f"config.json sets {name}={shown(value)}; only {needed} is supported. Use the released config.json."
            )
    settings = DIT_SETTINGS | EXPERT_SETTINGS
    values = {ours: official[theirs] for ours, theirs in settings.items() if theirs in official}
    released = S2VModelConfig()
    for ours, value in values.items():
        kind = type(getattr(released, ours))
        check_kind(settings[ours], value, list if kind is tuple else kind)
    if values.get("num_experts") and "top_k" not in values:
        raise CheckpointError(f"config.json has num_experts={values['num_experts']} but no top_k. {ADD_TOP_K}")
    layers = values.get("injected_blocks", S2VModelConfig.injected_blocks)
    check_counts(
        {"num_layers": values.get("blocks", 0), "num_experts": values.get("num_experts", 0)}
        | {"the length of audio_inject_layers": len(layers)}
    )
    check_counts({"text_len": values.get("text_tokens", 0)}, MOST_TEXT_TOKENS)
    values["injected_blocks"] = injector_places(layers, values.get("blocks", S2VModelConfig.blocks))
    if official.get("out_dim", values.get("latent_channels", 16)) != values.get("latent_channels", 16):
        raise CheckpointError("config.json has out_dim other than in_dim. Use the released config.json.")
    try:
        return S2VModelConfig(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"config.json cannot be used: {shown(error, 400)}") from error


def injector_places(layers: Iterable[int], blocks: int) -> tuple[int, ...]:
    """The block that each injector of a checkpoint serves.

    The reference makes an injector for every block whose number begins with the digits of a listed layer, in order,
    and uses the last one made for a layer. With 1 in the list and more than 10 blocks, some serve no block.
    """
    made = [layer for block in range(blocks) for layer in layers if str(block).startswith(str(layer))]
    lost = [layer for layer in layers if layer not in made]
    last = {layer: index for index, layer in enumerate(made)}
    return tuple(layer if last[layer] == index else UNUSED for index, layer in enumerate(made)) + tuple(lost)


def official_dit_config(config: S2VModelConfig) -> dict[str, Any]:
    """Our config as an official config.json says it."""
    settings = DIT_SETTINGS | (EXPERT_SETTINGS if config.num_experts else {})
    values = {theirs: getattr(config, ours) for ours, theirs in settings.items()}
    if not config.gate_probes:  # as of every gate that was learned
        values.pop("gate_probes", None)
    values["audio_inject_layers"] = [block for block in config.injected_blocks if block != UNUSED]
    fixed = {name: value for name, value in FIXED_SETTINGS.items() if not isinstance(value, tuple)}
    return fixed | values | {"_class_name": "WanModel_S2V", "model_type": "s2v", "out_dim": config.latent_channels}


def infer_dit_config(shape: Shape) -> S2VModelConfig:
    """Sizes from shapes, for single files that carry no config.

    Heads are 128 wide and injectors sit where the 14B model has them, which shapes cannot show.

    Raises:
        CheckpointError: if that cannot be.
    """
    released = S2VModelConfig()
    if experts := count_layers(shape, "stack.blocks.0.feed_forward.experts.{}.up.weight"):
        raise CheckpointError(
            f"this S2V file has {experts} experts in a feed-forward and no config, and tensors do not show top_k. "
            "Use the folder with its config.json, or put the config into the file's metadata."
        )
    audio_tokens_width, audio_width, _ = shape("audio_encoder.local_in.weight")
    hidden, width = shape("stack.blocks.0.feed_forward.up.weight")
    blocks = count_layers(shape, "stack.blocks.{}.modulation")
    injectors = count_layers(shape, "stack.injectors.{}.attention.q.weight")
    if width % released.head_width or blocks != released.blocks or injectors != len(released.injected_blocks):
        raise CheckpointError(
            f"this S2V file has {blocks} blocks of width {width} with {injectors} audio injectors and no config. "
            f"Only the 14B layout ({released.blocks} blocks, {len(released.injected_blocks)} injectors) can be read "
            "without one: use the folder with its config.json."
        )
    return S2VModelConfig(
        width=width,
        feed_forward_width=hidden,
        heads=width // released.head_width,
        blocks=blocks,
        latent_channels=shape("patch_embedding.weight")[1],
        pose_channels=shape("pose_embedding.weight")[1] if has(shape, "pose_embedding.weight") else 0,
        text_width=shape("text_embedding.0.weight")[1],
        time_width=shape("time_embedding.0.weight")[1],
        audio_width=audio_width,
        audio_layers=audio_layers(shape),
        audio_tokens=audio_tokens_width // shape("audio_encoder.middle.weight")[1],
        modulates_audio=has(shape, "audio_encoder.global_out.weight"),
        packs_motion=has(shape, "motion_packer.near.weight"),
    )


def audio_layers(shape: Shape) -> int:
    """Layers of the speech model that the DiT mixes; no config.json says it."""
    return shape("audio_encoder.layer_weights")[1]


# --- the VAE -----------------------------------------------------------------------------------------------------

UPSAMPLES_PER_LEVEL = 4
"""Entries per level of the official decoder: three residual blocks and an upsampler."""
RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
RESIDUAL |= {"conv_shortcut": "shortcut"}
VAE_RULES: Rules = (  # diffusers' AutoencoderKLWan -> official
    (r"^decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", lambda found: _upsample(int(found[1]), int(found[2]))),
    (r"^decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda found: _upsample(int(found[1]), UPSAMPLES_PER_LEVEL - 1)),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"(?<=\d\.)(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda found: RESIDUAL[found[1]] + "."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.conv_in\.", ".conv1."),
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
)


def _upsample(level: int, place: int) -> str:
    return f"decoder.upsamples.{UPSAMPLES_PER_LEVEL * level + place}."


def vae_name(diffusers: str) -> str:
    """The official name of one of AutoencoderKLWan's parameters."""
    return rename(diffusers, VAE_RULES)


def infer_vae_sizes(shape: Shape) -> dict[str, int]:
    """Arguments of VideoVAE."""
    return {"width": shape("encoder.conv_in.weight")[0], "latent_channels": shape("post_quant_conv.weight")[0]}


# --- umT5 --------------------------------------------------------------------------------------------------------

TEXT_RULES: Rules = (  # transformers' UMT5EncoderModel -> official
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    (r"^(blocks\.\d+)\.attn\.relative_attention_bias\.", r"\1.pos_embedding.embedding."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.", r"blocks.\1.ffn."),
    (r"\.ffn\.wi_0\.", ".ffn.gate.0."),
    (r"\.ffn\.wi_1\.", ".ffn.fc1."),
    (r"\.ffn\.wo\.", ".ffn.fc2."),
)
TOKENIZER_TENSOR = "spiece_model"
"""Where ComfyUI's umT5 files keep their sentencepiece model."""
TIED_TEXT_NAMES = ("encoder.embed_tokens.weight",)
"""The same tensor as `shared.weight`; some files hold it twice."""


def text_encoder_name(transformers: str) -> str:
    """The official name of one of UMT5EncoderModel's parameters."""
    return rename(transformers, TEXT_RULES)


def infer_text_sizes(shape: Shape) -> dict[str, int]:
    """Arguments of UMT5Config."""
    attention, dense = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = shape(attention + "relative_attention_bias.weight")
    vocabulary, width = shape("shared.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape(attention + "q.weight")[0] // heads,
        "d_ff": shape(dense + "wi_0.weight")[0],
        "num_layers": count_layers(shape, "encoder.block.{}.layer.0.layer_norm.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


# --- wav2vec 2.0 -------------------------------------------------------------------------------------------------

SPEECH_PREFIX = "wav2vec2."
"""Files of models made for transcription keep the encoder under this name."""
OLD_WEIGHT_NORM: Rules = (  # transformers -> files older than PyTorch's parametrizations
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
)
POSITION = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
SPEECH_EXTRAS = re.compile(r"^(wav2vec2\.)?(lm_head|quantizer|project_q|project_hid|masked_spec_embed)\b")
"""Parts of a wav2vec 2.0 file that only training and transcription use."""
SPEECH_SETTINGS = {
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "hidden_act": str,
    "layer_norm_eps": float,
    "conv_dim": list,
    "conv_kernel": list,
    "conv_stride": list,
    "conv_bias": bool,
    "feat_extract_norm": str,
    "feat_extract_activation": str,
    "do_stable_layer_norm": bool,
    "num_conv_pos_embeddings": int,
    "num_conv_pos_embedding_groups": int,
}
"""Entries of a wav2vec 2.0 config.json that describe the network, and their kinds."""
SPEECH_STRIDE = 320
"""Samples at 16 kHz for each of 50 features a second."""


def speech_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a wav2vec 2.0 config.json that describes the network.

    Raises:
        CheckpointError: if it describes another model, or an entry is of another kind or out of bounds.
    """
    kind = settings.get("model_type", "wav2vec2")
    if kind != "wav2vec2" or "hidden_size" not in settings:
        raise CheckpointError(
            f"config.json beside the audio encoder is of another model (model_type={shown(repr(kind))}), not of "
            "wav2vec 2.0. Use the config.json that came with it."
        )
    values = {"num_hidden_layers": 12} | {name: settings[name] for name in SPEECH_SETTINGS if name in settings}
    for name, value in values.items():
        check_kind(name, value, SPEECH_SETTINGS[name])
    lengths = {f"the length of {name}": len(value) for name, value in values.items() if isinstance(value, list)}
    check_counts({"num_hidden_layers": values["num_hidden_layers"]} | lengths)
    strides = values.get("conv_stride", [SPEECH_STRIDE])
    if math.prod(strides) != SPEECH_STRIDE:
        raise CheckpointError(
            f"config.json sets conv_stride={shown(strides)}: a feature for each {shown(math.prod(strides))} samples; "
            f"one for each {SPEECH_STRIDE} is needed. Use the released config.json."
        )
    return values


def speech_naming(entries: Mapping[str, WeightEntry]) -> Callable[[str], str]:
    """transformers' names -> those of this file."""
    prefix = SPEECH_PREFIX if any(name.startswith(SPEECH_PREFIX) for name in entries) else ""
    rules = () if prefix + POSITION in entries else OLD_WEIGHT_NORM
    return lambda name: prefix + rename(name, rules)


def infer_speech_settings(shape: Shape) -> dict[str, Any]:
    """Arguments of Wav2Vec2Config from shapes: heads are 64 wide, as in all released models."""
    conv = "feature_extractor.conv_layers.{}.conv.weight"
    convs = [shape(conv.format(index)) for index in range(count_layers(shape, conv))]
    hidden, position = shape("encoder.layer_norm.weight")[0], shape(POSITION)
    every_layer_normed = has(shape, "feature_extractor.conv_layers.1.layer_norm.weight")
    return {
        "hidden_size": hidden,
        "num_attention_heads": max(1, hidden // 64),
        "num_hidden_layers": count_layers(shape, "encoder.layers.{}.layer_norm.weight"),
        "intermediate_size": shape("encoder.layers.0.feed_forward.intermediate_dense.weight")[0],
        "conv_dim": [size[0] for size in convs],
        "conv_kernel": [size[2] for size in convs],
        "conv_stride": [5] + [2] * (len(convs) - 1),
        "conv_bias": has(shape, "feature_extractor.conv_layers.0.conv.bias"),
        "feat_extract_norm": "layer" if every_layer_normed else "group",
        "do_stable_layer_norm": every_layer_normed,
        "num_conv_pos_embeddings": position[2],
        "num_conv_pos_embedding_groups": hidden // position[1],
    }


# --- 8-bit weights -----------------------------------------------------------------------------------------------

SCALE_SUFFIXES = ("scale_weight", "weight_scale")
"""`X.scale_weight` (ComfyUI up to 0.3.6x, KJ) or `X.weight_scale` (ComfyUI since) multiplies `X.weight`."""
SCALE_NOISE = re.compile(r"(^scaled_fp8$|\.scale_input$|\.input_scale$|\.comfy_quant$)")
"""Notes for 8-bit kernels that say nothing about the value of a weight."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_scale(name: str) -> bool:
    return name.endswith(tuple("." + suffix for suffix in SCALE_SUFFIXES)) or bool(SCALE_NOISE.search(name))


def read_weight(entries: Mapping[str, WeightEntry], name: str) -> Tensor:
    """One tensor as floating point, row after row in memory; scaled 8-bit weights are multiplied out in float32.

    Old PyTorch files may hold views in another order, with which matrix products round differently.
    """
    entry, scale = entries[name], find_scale(entries, name)
    if entry.dtype not in FLOAT8 or scale is None:
        return entry.read().contiguous()
    return entry.read().float() * scale.read().float().view(-1, *[1] * (len(entry.shape) - 1))


def read_stored(entries: Mapping[str, WeightEntry], name: str) -> tuple[Tensor, Tensor] | None:
    """The values of a float8 weight as the file has them, rows columns, and the scale of each row, rows 1 in float32.

    None where that is not what the file has: a weight of another type, or of the kind of float8 with a longer range
    (e5m2), which no product is made for.
    """
    entry, scale = entries[name], find_scale(entries, name)
    if entry.dtype != torch.float8_e4m3fn or len(entry.shape) != 2:
        return None
    factors = torch.ones(1, 1) if scale is None else scale.read().float().view(-1, 1)
    return entry.read().contiguous(), factors.expand(entry.shape[0], 1)


def find_scale(entries: Mapping[str, WeightEntry], name: str) -> WeightEntry | None:
    base = name.removesuffix(".weight")
    return next((entries[key] for suffix in SCALE_SUFFIXES if (key := f"{base}.{suffix}") in entries), None)


# --- telling files apart -----------------------------------------------------------------------------------------

DIT, VAE, TEXT_ENCODER, SPEECH_ENCODER = "dit", "vae", "text_encoder", "audio_encoder"
LOW_NOISE_DIT = "low_noise_dit"
"""In a run, besides the kinds: the second DiT of a pair, for steps of low noise."""


def kind_of(name: str) -> str:
    """What kind of network one is that has a name in a run."""
    return DIT if name == LOW_NOISE_DIT else name


PART_LABELS = {
    DIT: "S2V DiT",
    VAE: "Wan 2.1 VAE",
    TEXT_ENCODER: "umT5 text encoder",
    SPEECH_ENCODER: "wav2vec 2.0 audio encoder",
}
LORA = re.compile(r"(lora_(up|down|A|B)|hada_w\d|lokr_w\d)\b")
OTHER_FAMILIES: tuple[tuple[str, Callable[[Mapping[str, WeightEntry]], bool]], ...] = (
    ("Wan VACE", lambda e: any(name.startswith("vace_blocks.") for name in e)),
    ("Wan Animate", lambda e: any(name.startswith(("face_adapter.", "motion_encoder.")) for name in e)),
    ("Wan image-to-video with an image encoder", lambda e: "img_emb.proj.0.weight" in e),
    ("Wan image-to-video", lambda e: _channels(e) == 36),
    ("Wan2.2 TI2V 5B", lambda e: _channels(e) == 48),
    ("Wan text-to-video", lambda e: "head.modulation" in e and "blocks.0.self_attn.q.weight" in e),
    ("Wan in diffusers' layout", lambda e: "condition_embedder.time_embedder.linear_1.weight" in e),
    ("the Wan 2.2 VAE of TI2V-5B (48 channels)", lambda e: "decoder.upsamples.0.upsamples.0.residual.0.gamma" in e),
    ("a Stable Diffusion VAE", lambda e: "decoder.mid.block_1.conv1.weight" in e),
    ("a Stable Diffusion checkpoint", lambda e: any(name.endswith("input_blocks.0.0.weight") for name in e)),
    ("Flux", lambda e: "double_blocks.0.img_attn.qkv.weight" in e),
    ("a T5 text encoder, not umT5", lambda e: "encoder.block.1.layer.0.SelfAttention.q.weight" in e),
    ("a CLIP text encoder", lambda e: "text_model.embeddings.token_embedding.weight" in e),
    ("Whisper", lambda e: "encoder.conv1.weight" in e and len(e["encoder.conv1.weight"].shape) == 3),
)


def _channels(entries: Mapping[str, WeightEntry]) -> int | None:
    entry = entries.get("patch_embedding.weight")
    return entry.shape[1] if entry and len(entry.shape) == 5 else None


@dataclass(frozen=True)
class Recognized:
    """What a weights file is: which part, in whose spelling, and how to find a parameter of ours in it."""

    part: str
    spelling: str
    entries: dict[str, WeightEntry]
    naming: Callable[[str], str]
    """Name in our network -> name in `entries`."""

    def shape(self, ours: str) -> tuple[int, ...]:
        return self.entries[self.naming(ours)].shape


def _strip_prefix(entries: Mapping[str, WeightEntry]) -> dict[str, WeightEntry]:
    for prefix in PREFIXES:
        if entries and all(name.startswith(prefix) or name == "scaled_fp8" for name in entries):
            return {name.removeprefix(prefix): entry for name, entry in entries.items()}
    return dict(entries)


def same_name(name: str) -> str:
    return name


def recognize(weights: Weights) -> Recognized:
    """Tell from names and shapes what a file holds, whatever it is called.

    Raises:
        CheckpointError: naming the model family it is instead, where that can be told, or a packed format.
    """
    found = _recognize(weights)
    for name, entry in found.entries.items():
        if name.endswith(".weight") and not entry.dtype.is_floating_point:
            stored = str(entry.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{shown_path(weights.path)} is a {PART_LABELS[found.part]} with {shown(name)} stored as {stored}, a "
                "packed format that is not read here. Use the bf16, fp16, fp32 or fp8_scaled file."
            )
        if entry.dtype in FLOAT8:
            check_scale(found.entries, name)
    return found


def check_scale(entries: Mapping[str, WeightEntry], name: str) -> None:
    """Whether an 8-bit weight has the scales it needs.

    Raises:
        CheckpointError: if they are missing in a file that says it has some, or do not fit.
    """
    scale = find_scale(entries, name)
    if scale is None and "scaled_fp8" in entries and name.endswith(".weight"):
        raise CheckpointError(f"{shown(name)} has no scale in a file that is marked as scaled. Download it again.")
    if scale is not None and (count := math.prod(scale.shape)) not in (1, *entries[name].shape[:1]):
        raise CheckpointError(
            f"{shown(name)} has {count} scales for {(*entries[name].shape, 1)[0]} rows. "
            "One scale, or one for each row, is read; use another 8-bit file or the bf16 one."
        )


def _recognize(weights: Weights) -> Recognized:
    entries = _strip_prefix(weights.entries)
    if any(LORA.search(name) for name in entries):
        raise CheckpointError(f"{shown_path(weights.path)} is a LoRA, not a whole model. {_wanted()}")
    if any(name.startswith("casual_audio_encoder.") for name in entries):
        return Recognized(DIT, "ComfyUI" if is_quantized(entries) else "official", entries, dit_name)
    if "token_embedding.weight" in entries and "blocks.0.pos_embedding.embedding.weight" in entries:
        return Recognized(TEXT_ENCODER, "official", entries, text_encoder_name)
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in entries:  # T5 has it in block 0 only
        return Recognized(
            TEXT_ENCODER, "ComfyUI" if TOKENIZER_TENSOR in entries else "transformers", entries, same_name
        )
    if "encoder.downsamples.0.residual.0.gamma" in entries and "encoder.downsamples.10.residual.2.weight" in entries:
        return Recognized(VAE, "official", entries, vae_name)
    if "encoder.down_blocks.0.conv1.weight" in entries and "post_quant_conv.weight" in entries:
        return Recognized(VAE, "diffusers", entries, same_name)
    if any(name.endswith("feature_extractor.conv_layers.0.conv.weight") for name in entries):
        kept = {name: entry for name, entry in entries.items() if not SPEECH_EXTRAS.match(name)}
        return Recognized(SPEECH_ENCODER, "transformers", kept, speech_naming(kept))
    for family, fits in OTHER_FAMILIES:
        if fits(entries):
            raise CheckpointError(f"{shown_path(weights.path)} is {family}. {_wanted()}")
    sample = ", ".join(map(shown, list(entries)[:3])) or "none"
    raise CheckpointError(f"{shown_path(weights.path)} is of an unknown model family (tensors: {sample}). {_wanted()}")


def _wanted() -> str:
    return f"Usable here: {', '.join(PART_LABELS.values())} of Wan2.2-S2V-14B."


def is_quantized(entries: Iterable[str]) -> bool:
    return any(is_scale(name) for name in entries)


@dataclass(frozen=True)
class NameReport:
    """How the tensors of a file meet those of a network."""

    wanted: int
    matched: int
    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[str]


def compare_names(found: Recognized, wanted: Mapping[str, tuple[int, ...]]) -> NameReport:
    """Compare a file with the names and shapes of our network, reported under the file's names.

    Scales, tied copies and a tokenizer inside the file do not count.

    Raises:
        CheckpointError: if one of them is stored in whole numbers.
    """
    shapes = {found.naming(ours): shape for ours, shape in wanted.items() if ours not in TIED_TEXT_NAMES}
    for name in shapes:
        if name in found.entries and not (dtype := found.entries[name].dtype).is_floating_point:
            raise CheckpointError(
                f"{shown(name)} is stored as {dtype}, which is no type of weights. Use the bf16, fp16 or fp32 file."
            )
    present = {n for n in found.entries if not is_scale(n) and n not in (TOKENIZER_TENSOR, *TIED_TEXT_NAMES)}
    both = present & set(shapes)
    wrong = sorted(name for name in both if found.entries[name].shape != shapes[name])
    missing, unexpected = sorted(set(shapes) - present), sorted(present - set(shapes))
    return NameReport(len(shapes), len(both) - len(wrong), missing, unexpected, wrong)
