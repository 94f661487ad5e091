"""Socket types of our own, and ComfyUI's values as ours and back."""

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import comfy.latent_formats
import torch
from comfy_api.input import VideoInput
from comfy_api.latest import InputImpl, io
from torch import Tensor

from ..wan_s2v_core.conditioning.audio import resample_features, resampled_length
from ..wan_s2v_core.conditioning.bundle import Voice
from ..wan_s2v_core.conditioning.pose import frames_at
from ..wan_s2v_core.errors import ConfigError, shown
from ..wan_s2v_core.io.audio import Recording, check_recording
from ..wan_s2v_core.io.foreign import CURE, looks_like_mapping, pictures_of, value_of
from ..wan_s2v_core.io.outside import foreign_parser
from ..wan_s2v_core.io.scratch import scratch
from ..wan_s2v_core.io.video import DrivingVideo
from ..wan_s2v_core.model.audio_encoder import SPEECH_FEATURE_HZ
from ..wan_s2v_core.model.checkpoint import DIT, PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE

LAYERS = "encoded_audio_all_layers"
LARGEST_DIFFERENCE_SECONDS = 0.1
"""By which a recording and what was heard of it may differ: the encoder needs 25 ms for a feature at the end."""

S2VModel = io.Custom("WAN_S2V_MODEL")
S2VTextEncoder = io.Custom("WAN_S2V_TEXT_ENCODER")
S2VAudioEncoder = io.Custom("WAN_S2V_AUDIO_ENCODER")
S2VVae = io.Custom("WAN_S2V_VAE")
S2VVoice = io.Custom("WAN_S2V_VOICE")
S2VConditioningSocket = io.Custom("WAN_S2V_CONDITIONING")
S2VClips = io.Custom("WAN_S2V_CLIPS")

KNOWS_ALIASES = "search_aliases" in inspect.signature(io.Schema).parameters


def found_by(*words: str) -> dict[str, list[str]]:
    """An argument of io.Schema: other words that find a node in the menu. Older versions of ComfyUI have none."""
    return {"search_aliases": list(words)} if KNOWS_ALIASES else {}


NETWORKS = {
    "model": DIT,
    "low_noise_model": DIT,
    "text_encoder": TEXT_ENCODER,
    "audio_encoder": SPEECH_ENCODER,
    "vae": VAE,
}
"""Inputs that take a network, and its kind."""


def check_link(name: str, value: Any, kind: type) -> None:
    """Raises ConfigError if an input was not made by a node, or is a network of another kind: prompts of the API may
    hold a value instead of a link, and outputs of any type fit every input; ComfyUI looks at neither."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={shown(repr(value))} is no link to a node. Connect the output that gives it.")
    recipe, wanted = getattr(value, "recipe", None), NETWORKS.get(name)
    if wanted and recipe and recipe.kind != wanted:
        raise ConfigError(
            f"{name} is connected to a {PART_LABELS[recipe.kind]}, not to a {PART_LABELS[wanted]}. "
            "Connect the output of the loader that gives it."
        )


def audio_of(recording: Recording, seconds: float) -> dict[str, Any]:
    """A recording as AUDIO, cut or filled with silence to `seconds`."""
    length = round(seconds * recording.rate_hz)
    samples = recording.samples[:, :length]
    filled = torch.nn.functional.pad(samples, (0, length - samples.shape[1]))
    return {"waveform": filled[None], "sample_rate": recording.rate_hz}


def latent_of(latents: Tensor) -> dict[str, Tensor]:
    """Normalised latents of ours as LATENT, which carries them as the VAE gives them."""
    return {"samples": comfy.latent_formats.Wan21().process_out(latents.float().cpu())}


def voice_of(heard: Any, recording: Recording) -> Voice:
    """AUDIO_ENCODER_OUTPUT and the recording it was made from -> what Wan S2V Encode Audio would give.

    Raises:
        ConfigError: if it holds no layers, or those of another recording.
    """
    check_recording(recording)
    with foreign_parser("audio_encoder_output", CURE):
        return _voice_of(heard, recording)


def _voice_of(heard: Any, recording: Recording) -> Voice:
    found = value_of(heard, LAYERS, "audio_encoder_output") if looks_like_mapping(heard) else None
    layers = [layer for layer in found if isinstance(layer, Tensor)] if isinstance(found, (list, tuple)) else []
    shapes = {tuple(layer.shape[1:]) for layer in layers}
    if len(shapes) != 1 or len(*shapes) != 2 or not len(layers[0]):
        raise ConfigError(
            "audio_encoder_output holds no layers of an audio encoder (batch, time, width). Connect AudioEncoderEncode."
        )
    seconds = layers[0].shape[1] / SPEECH_FEATURE_HZ
    if abs(seconds - recording.seconds) > LARGEST_DIFFERENCE_SECONDS:
        raise ConfigError(
            f"audio_encoder_output was made from {seconds:.2f} s of sound, audio lasts {recording.seconds:.2f} s. "
            "Connect the same recording to both."
        )
    frames, width = layers[0].shape[1:]
    features = scratch((len(layers), resampled_length(frames, SPEECH_FEATURE_HZ), width))
    for number, layer in enumerate(layers):
        features[number] = resample_features(layer[:1].float(), SPEECH_FEATURE_HZ)[0]
    return Voice(recording, features)


def picture_of(image: Any) -> Tensor:
    """The first picture of an IMAGE, B H W C in 0..1 -> H W 3 uint8; transparency on black, grey as RGB.

    Raises:
        ConfigError: if it has no picture, another number of channels, or values that are not finite.
    """
    return pictures_of(image, most=1)[0]


def text_of(conditioning: Any, name: str) -> Tensor:
    """CONDITIONING -> embeddings 1 L E without padding.

    Raises:
        ConfigError: if it holds no text embeddings.
    """
    match conditioning:
        case [[Tensor(ndim=3) as embeddings, *_], *_]:
            pass
        case _:
            raise ConfigError(
                f"{name} holds no text embeddings. Connect Wan S2V Encode Text, or umT5's CLIP Text Encode."
            )
    with foreign_parser(name, CURE):
        used = embeddings[:1].abs().amax(dim=(0, 2)).nonzero()  # ComfyUI pads with zeros
        return embeddings[:1, : int(used[-1]) + 1 if len(used) else 1].float().cpu()


def pose_of(video: Any, fps: float) -> Callable[[int, int], Tensor]:
    """VIDEO -> its frames on our clock, read from the file as they are needed where it is a whole file.

    Raises:
        ConfigError: if it is no video.
    """
    check_link("pose_video", video, VideoInput)
    if isinstance(video, InputImpl.VideoFromFile) and is_whole(video):
        source = video.get_stream_source()
        if isinstance(source, str):
            return DrivingVideo(source, fps)
    parts = video.get_components()
    pictures, rate = pictures_of(parts.images), Fraction(parts.frame_rate)
    return lambda start, frames: frames_at(pictures, rate, fps, start, frames)


def is_whole(video: Any) -> bool:
    """Newer versions of ComfyUI can cut a video in time or space, and keep that beside the name of its file."""
    return not any(value for name, value in vars(video).items() if not name.endswith("__file"))
