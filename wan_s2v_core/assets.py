"""What comes with the pack: a tiny checkpoint, a portrait and a voice, so that everything works without a download."""

from pathlib import Path

from .errors import ConfigError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CHECKPOINT, PORTRAIT, VOICE = "checkpoint", "portrait.png", "voice.flac"
DEMO_PROMPT = "A person talks to the camera."


def embedded(name: str) -> Path:
    """Where one of them lies.

    Raises:
        ConfigError: if the pack was copied without it.
    """
    path = ASSETS / name
    if not path.exists():
        raise ConfigError(f"{path} is not there; it comes with the pack. Use a complete copy of the pack's folder.")
    return path
