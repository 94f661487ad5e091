"""What comes with the pack: a tiny checkpoint, a portrait and a voice, so that everything works without a download."""

from pathlib import Path

from .config import DEMO, PRESETS
from .errors import ConfigError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CHECKPOINT, PORTRAIT, VOICE = "checkpoint", "portrait.png", "voice.flac"
DEMO_PROMPT = "A person with long brown hair, green eyes and a green shirt talks to the camera, orange background."
"""The portrait, in the words that the embedded model was trained with. Its negative prompt is the default one."""
DEMO_SIDE_PX = 256
"""The only size that the embedded model has learned; the workflows of the demo have these settings too."""
DEMO_SAMPLING = PRESETS[DEMO]


def embedded(name: str) -> Path:
    """Where one of them lies.

    Raises:
        ConfigError: if the pack was copied without it.
    """
    path = ASSETS / name
    if not path.exists():
        raise ConfigError(f"{path} is not there; it comes with the pack. Use a complete copy of the pack's folder.")
    return path
