"""The only home of foreign spellings: which file is what, and how its tensor and setting names become ours.

Layouts read: the official folder of Wan2.2-S2V-14B and ComfyUI's single files; VAE and umT5 also in diffusers' and
transformers' names.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import S2VModelConfig
from ..errors import CheckpointError, ConfigError
from ..io.weights import WeightEntry, Weights

Rules = tuple[tuple[str, str], ...]
"""(regular expression, replacement) pairs; all of them are applied, in order."""


def rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


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
    (r"^(blocks\.\d+)\.feed_forward\.up\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.feed_forward\.down\.", r"\1.ffn.2."),
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
FIXED_SETTINGS = {  # what other values in an official config.json would change is not built
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


def dit_name(ours: str) -> str:
    """The official name of one of the DiT's parameters."""
    return rename(ours, DIT_RULES)


def dit_config(official: Mapping[str, Any]) -> S2VModelConfig:
    """An official config.json as ours; what it leaves out is the 14B model's.

    Raises:
        CheckpointError: if it describes another model, or a variant that is not built.
    """
    kind = str(official.get("model_type", "s2v"))
    if kind != "s2v" or "S2V" not in str(official.get("_class_name", "S2V")):
        raise CheckpointError(
            f"config.json describes model_type={kind!r} ({official.get('_class_name')}), not S2V. "
            "Point to the folder of Wan2.2-S2V-14B."
        )
    for name, needed in FIXED_SETTINGS.items():
        value = official.get(name, needed)
        if (tuple(value) if isinstance(value, list) else value) != needed:
            raise CheckpointError(
                f"config.json sets {name}={value}; only {needed} is supported. Use the released config.json."
            )
    values = {ours: official[theirs] for ours, theirs in DIT_SETTINGS.items() if theirs in official}
    values["injected_blocks"] = tuple(sorted(values.get("injected_blocks", S2VModelConfig.injected_blocks)))
    if official.get("out_dim", values.get("latent_channels", 16)) != values.get("latent_channels", 16):
        raise CheckpointError("config.json has out_dim other than in_dim. Use the released config.json.")
    try:
        return S2VModelConfig(**values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"config.json cannot be used: {error}") from error


def official_dit_config(config: S2VModelConfig) -> dict[str, Any]:
    """Our config as an official config.json says it."""
    values = {theirs: getattr(config, ours) for ours, theirs in DIT_SETTINGS.items()}
    fixed = {name: value for name, value in FIXED_SETTINGS.items() if not isinstance(value, tuple)}
    return fixed | values | {"_class_name": "WanModel_S2V", "model_type": "s2v", "out_dim": config.latent_channels}


def infer_dit_config(shapes: Mapping[str, tuple[int, ...]]) -> S2VModelConfig:
    """Sizes from official names and shapes, for single files that carry no config.

    Heads are 128 wide and injectors sit where the 14B model has them, which shapes cannot show.

    Raises:
        CheckpointError: if that cannot be.
    """
    width, audio_width, _ = shapes["casual_audio_encoder.encoder.conv1_local.conv.weight"]
    injectors = 1 + max(int(n[1]) for k in shapes if (n := re.match(r"audio_injector\.injector\.(\d+)\.", k)))
    blocks = 1 + max(int(n[1]) for k in shapes if (n := re.match(r"blocks\.(\d+)\.", k)))
    released = S2VModelConfig()
    if width % released.head_width or blocks != released.blocks or injectors != len(released.injected_blocks):
        raise CheckpointError(
            f"this S2V file has {blocks} blocks of width {width} with {injectors} audio injectors and no config. "
            f"Only the 14B layout ({released.blocks} blocks, {len(released.injected_blocks)} injectors) can be read "
            "without one: use the folder with its config.json."
        )
    first = shapes["blocks.0.ffn.0.weight"]
    pose = shapes.get("cond_encoder.weight")
    return S2VModelConfig(
        width=width,
        feed_forward_width=first[0],
        heads=width // released.head_width,
        blocks=blocks,
        latent_channels=shapes["patch_embedding.weight"][1],
        pose_channels=pose[1] if pose else 0,
        text_width=shapes["text_embedding.0.weight"][1],
        time_width=shapes["time_embedding.0.weight"][1],
        audio_width=audio_width,
        audio_layers=shapes["casual_audio_encoder.weights"][1],
        audio_tokens=width // shapes["casual_audio_encoder.encoder.conv2.conv.weight"][1],
        modulates_audio="casual_audio_encoder.encoder.final_linear.weight" in shapes,
        packs_motion="frame_packer.proj.weight" in shapes,
    )


# --- the VAE -----------------------------------------------------------------------------------------------------

RESIDUAL = {"0.gamma": "norm1.gamma", "2.weight": "conv1.weight", "2.bias": "conv1.bias"}
RESIDUAL |= {"3.gamma": "norm2.gamma", "6.weight": "conv2.weight", "6.bias": "conv2.bias"}
UPSAMPLERS = 4
"""Entries per level of the official decoder: three residual blocks and an upsampler."""


def vae_name(official: str) -> str:
    """A name of the official Wan 2.1 VAE as diffusers' AutoencoderKLWan spells it; its own names pass unchanged."""
    name = re.sub(r"\.residual\.(.+)$", lambda found: "." + RESIDUAL.get(found[1], found[0]), official)
    name = re.sub(
        r"^decoder\.upsamples\.(\d+)\.(?:(resample|time_conv)\.)?",
        lambda found: _up_block(int(found[1])) + (f"{found[2]}." if found[2] else ""),
        name,
    )
    return rename(
        name,
        (
            (r"^encoder\.downsamples\.", "encoder.down_blocks."),
            (r"\.shortcut\.", ".conv_shortcut."),
            (r"\.middle\.0\.", ".mid_block.resnets.0."),
            (r"\.middle\.1\.", ".mid_block.attentions.0."),
            (r"\.middle\.2\.", ".mid_block.resnets.1."),
            (r"\.head\.0\.gamma$", ".norm_out.gamma"),
            (r"\.head\.2\.", ".conv_out."),
            (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
            (r"^conv1\.", "quant_conv."),
            (r"^conv2\.", "post_quant_conv."),
        ),
    )


def _up_block(index: int) -> str:
    level, place = divmod(index, UPSAMPLERS)
    inside = "upsamplers.0" if place == UPSAMPLERS - 1 else f"resnets.{place}"
    return f"decoder.up_blocks.{level}.{inside}."


# --- umT5 --------------------------------------------------------------------------------------------------------

TEXT_RULES: Rules = (  # official -> transformers; its own names pass unchanged
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)
TOKENIZER_TENSOR = "spiece_model"
"""Where ComfyUI's umT5 files keep their sentencepiece model."""
TIED_TEXT_NAMES = ("encoder.embed_tokens.weight",)
"""The same tensor as `shared.weight`; some files hold it twice."""


def text_encoder_name(official: str) -> str:
    return rename(official, TEXT_RULES)


def infer_text_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Arguments of UMT5Config from transformers' names and shapes."""
    inside = "encoder.block.0.layer.{}."
    bias = shapes[inside.format(0) + "SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": shapes["shared.weight"][0],
        "d_model": shapes["shared.weight"][1],
        "d_kv": shapes[inside.format(0) + "SelfAttention.q.weight"][0] // bias[1],
        "d_ff": shapes[inside.format(1) + "DenseReluDense.wi_0.weight"][0],
        "num_layers": 1 + max(int(n[1]) for k in shapes if (n := re.match(r"encoder\.block\.(\d+)\.", k))),
        "num_heads": bias[1],
        "relative_attention_num_buckets": bias[0],
    }


# --- wav2vec 2.0 -------------------------------------------------------------------------------------------------

SPEECH_RULES: Rules = (  # files of all ages -> transformers with parametrized weight norm
    (r"^wav2vec2\.", ""),
    (r"\.pos_conv_embed\.conv\.weight_g$", ".pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"\.pos_conv_embed\.conv\.weight_v$", ".pos_conv_embed.conv.parametrizations.weight.original1"),
)
SPEECH_EXTRAS = re.compile(r"^(lm_head|quantizer|project_q|project_hid|dropout|masked_spec_embed)\b")
"""Parts of a wav2vec 2.0 file that only training and transcription use."""


def speech_encoder_name(foreign: str) -> str:
    return rename(foreign, SPEECH_RULES)


def infer_speech_settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of Wav2Vec2Config from names and shapes: heads are 64 wide, as in all released models."""
    convs = sorted(
        (int(n[1]), shape)
        for k, shape in shapes.items()
        if (n := re.match(r"feature_extractor\.conv_layers\.(\d+)\.conv\.weight$", k))
    )
    hidden = shapes["encoder.layer_norm.weight"][0]
    position = shapes["encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    every_layer_normed = "feature_extractor.conv_layers.1.layer_norm.weight" in shapes
    return {
        "hidden_size": hidden,
        "num_attention_heads": max(1, hidden // 64),
        "num_hidden_layers": 1 + max(int(n[1]) for k in shapes if (n := re.match(r"encoder\.layers\.(\d+)\.", k))),
        "intermediate_size": shapes["encoder.layers.0.feed_forward.intermediate_dense.weight"][0],
        "conv_dim": [shape[0] for _, shape in convs],
        "conv_kernel": [shape[2] for _, shape in convs],
        "conv_stride": [5] + [2] * (len(convs) - 1),
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in shapes,
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
    """One tensor as floating point; scaled 8-bit weights are multiplied out in float32.

    Raises:
        CheckpointError: if its type holds no plain number, as in packed 4-bit formats.
    """
    entry = entries[name]
    if not entry.dtype.is_floating_point:
        raise CheckpointError(
            f"{name} is stored as {str(entry.dtype).removeprefix('torch.')}, a packed format that is not read here. "
            "Use the bf16, fp16, fp32 or fp8_scaled file."
        )
    base = name.removesuffix(".weight")
    scale = next((entries[key] for s in SCALE_SUFFIXES if (key := f"{base}.{s}") in entries), None)
    if entry.dtype not in FLOAT8 or scale is None:
        return entry.read()
    factor = scale.read().float()
    if factor.numel() not in (1, entry.shape[0]):
        raise CheckpointError(
            f"{name} has {factor.numel()} scales for {entry.shape[0]} rows. One scale, or one for each row, is read; "
            "use another 8-bit file or the bf16 one."
        )
    return entry.read().float() * factor.view(-1, *[1] * (len(entry.shape) - 1))


# --- telling files apart -----------------------------------------------------------------------------------------

DIT, VAE, TEXT_ENCODER, SPEECH_ENCODER = "dit", "vae", "text_encoder", "audio_encoder"
PART_LABELS = {
    DIT: "S2V DiT",
    VAE: "Wan 2.1 VAE",
    TEXT_ENCODER: "umT5 text encoder",
    SPEECH_ENCODER: "wav2vec 2.0 audio encoder",
}
OTHER_FAMILIES: tuple[tuple[str, Callable[[Mapping[str, WeightEntry]], bool]], ...] = (
    ("a LoRA, not a whole model", lambda e: any(re.search(r"lora_(up|down|A|B)\b", name) for name in e)),
    ("Wan VACE", lambda e: any(name.startswith("vace_blocks.") for name in e)),
    ("Wan Animate", lambda e: any(name.startswith(("face_adapter.", "motion_encoder.")) for name in e)),
    ("Wan image-to-video with an image encoder", lambda e: "img_emb.proj.0.weight" in e),
    ("Wan image-to-video", lambda e: _channels(e) == 36),
    ("Wan2.2 TI2V 5B", lambda e: _channels(e) == 48),
    ("Wan text-to-video", lambda e: "head.modulation" in e and "blocks.0.self_attn.q.weight" in e),
    ("Wan in diffusers' layout", lambda e: "condition_embedder.time_embedder.linear_1.weight" in e),
    ("the Wan 2.2 VAE of TI2V-5B (48 channels)", lambda e: "decoder.upsamples.0.upsamples.0.residual.0.gamma" in e),
    ("a Stable Diffusion VAE", lambda e: "decoder.mid.block_1.conv1.weight" in e),
    ("a Stable Diffusion checkpoint", lambda e: "input_blocks.0.0.weight" in e or "first_stage_model.decoder.conv_in.weight" in e),
    ("Flux", lambda e: "double_blocks.0.img_attn.qkv.weight" in e),
    ("a T5 text encoder, not umT5", lambda e: "encoder.block.1.layer.0.SelfAttention.q.weight" in e),
    ("a CLIP text encoder", lambda e: "text_model.embeddings.token_embedding.weight" in e),
    ("Whisper", lambda e: "model.encoder.conv1.weight" in e or "encoder.conv1.weight" in e and "encoder.embed_positions.weight" in e),
)


def _channels(entries: Mapping[str, WeightEntry]) -> int | None:
    entry = entries.get("patch_embedding.weight")
    return entry.shape[1] if entry and len(entry.shape) == 5 else None


@dataclass(frozen=True)
class Recognized:
    """What a weights file is: which part, in whose spelling, and its entries under canonical names.

    Canonical are the official names for the DiT, diffusers' for the VAE and transformers' for both encoders.
    """

    part: str
    spelling: str
    entries: dict[str, WeightEntry]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}


def _strip_prefix(entries: Mapping[str, WeightEntry]) -> dict[str, WeightEntry]:
    for prefix in PREFIXES:
        if entries and all(name.startswith(prefix) or name == "scaled_fp8" for name in entries):
            return {name.removeprefix(prefix): entry for name, entry in entries.items()}
    return dict(entries)


def _renamed(entries: Mapping[str, WeightEntry], naming: Callable[[str], str]) -> dict[str, WeightEntry]:
    return {naming(name): entry for name, entry in entries.items()}


def recognize(weights: Weights) -> Recognized:
    """Tell from names and shapes what a file holds, whatever it is called.

    Raises:
        CheckpointError: naming the model family it is instead, where that can be told.
    """
    entries = _strip_prefix(weights.entries)
    if any(name.startswith("casual_audio_encoder.") for name in entries):
        return Recognized(DIT, "ComfyUI" if is_quantized(entries) else "official", entries)
    if "token_embedding.weight" in entries and "blocks.0.pos_embedding.embedding.weight" in entries:
        return Recognized(TEXT_ENCODER, "official", _renamed(entries, text_encoder_name))
    if "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in entries:  # T5 has it in block 0 only
        return Recognized(TEXT_ENCODER, "ComfyUI" if TOKENIZER_TENSOR in entries else "transformers", entries)
    if "encoder.downsamples.0.residual.0.gamma" in entries and "encoder.head.2.weight" in entries:
        if entries["conv2.weight"].shape[0] == 16:
            return Recognized(VAE, "official", _renamed(entries, vae_name))
    elif "encoder.down_blocks.0.conv1.weight" in entries and "post_quant_conv.weight" in entries:
        return Recognized(VAE, "diffusers", entries)
    if any(name.endswith("feature_extractor.conv_layers.0.conv.weight") for name in entries):
        kept = {k: v for k, v in _renamed(entries, speech_encoder_name).items() if not SPEECH_EXTRAS.match(k)}
        return Recognized(SPEECH_ENCODER, "transformers", kept)
    for family, fits in OTHER_FAMILIES:
        if fits(entries):
            raise CheckpointError(f"{weights.path} is {family}. {_wanted()}")
    sample = ", ".join(list(entries)[:3]) or "none"
    raise CheckpointError(f"{weights.path} is of an unknown model family (tensors: {sample}). {_wanted()}")


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


def compare_names(entries: Mapping[str, WeightEntry], wanted: Mapping[str, tuple[int, ...]]) -> NameReport:
    """Compare canonical names and shapes; scales, tied copies and a tokenizer inside the file do not count."""
    wanted = {name: shape for name, shape in wanted.items() if name not in TIED_TEXT_NAMES}
    present = {n for n in entries if not is_scale(n) and n not in (TOKENIZER_TENSOR, *TIED_TEXT_NAMES)}
    both = present & set(wanted)
    wrong = sorted(n for n in both if entries[n].shape != wanted[n])
    missing, unexpected = sorted(set(wanted) - present), sorted(present - set(wanted))
    return NameReport(len(wanted), len(both) - len(wrong), missing, unexpected, wrong)
