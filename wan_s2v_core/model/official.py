"""The official folder of Wan2.2-S2V-14B: what is in it, how large the released files are, and what one lacks."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError, shown, shown_path
from ..io.weights import some_of
from .checkpoint import SPEECH_ENCODER, TEXT_ENCODER, VAE

SOURCE = "Wan-AI/Wan2.2-S2V-14B"
DIT_STEM = "diffusion_pytorch_model"
TOKENIZER_FOLDER = "google/umt5-xxl"
OFFICIAL_FILES = {
    VAE: ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"),
    TEXT_ENCODER: ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"),
    SPEECH_ENCODER: ("wav2vec2-large-xlsr-53-english",),
}
"""Where an official folder keeps what is not the DiT."""
RELEASED_SIZES = {VAE: "0.5 GB", TEXT_ENCODER: "11.4 GB", SPEECH_ENCODER: "a folder with 1.3 GB"}
DIT_SIZE = "32.6 GB in 4 shards with their index"
TOKENIZER_SIZE = "a folder with 21 MB"


def official_places(files: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Folders that look official, by their paths below a root, from those of the files there.

    Args:
        others: folders that are to count as well.
    """
    marks = {names[0] for kind, names in OFFICIAL_FILES.items() if kind != SPEECH_ENCODER}
    marks |= {names[-1] for kind, names in OFFICIAL_FILES.items() if kind != SPEECH_ENCODER}
    paths = (PurePosixPath(file) for file in files)
    found = {path.parent for path in paths if path.name in marks or path.name.startswith(DIT_STEM)}
    return sorted(str(path) for path in found | {PurePosixPath(other) for other in others} if path.name)


def missing_parts(folder: Path) -> list[str]:
    """What an official folder lacks, with the sizes of the released files."""
    parts = [] if (folder / "config.json").exists() else ["config.json (1 KB)"]
    if not any(folder.glob(f"{DIT_STEM}*.safetensors")):
        parts.append(f"{DIT_STEM}-*.safetensors ({DIT_SIZE})")
    for kind, names in OFFICIAL_FILES.items():
        if not any((folder / name).exists() for name in names):
            parts.append(f"{names[0]} ({RELEASED_SIZES[kind]})")
    has_own = (folder / OFFICIAL_FILES[TEXT_ENCODER][1]).exists()  # safetensors may carry their tokenizer
    if not has_own and not (folder / TOKENIZER_FOLDER).is_dir():
        parts.append(f"{TOKENIZER_FOLDER} ({TOKENIZER_SIZE})")
    return parts


def check_official(folder: Path) -> None:
    """Raises CheckpointError with everything that an official folder lacks and where it comes from."""
    try:
        is_there, is_folder, lacks = folder.exists(), folder.is_dir(), missing_parts(folder)
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        reason = shown(getattr(error, "strerror", None) or error)
        raise CheckpointError(f"{shown_path(folder)} cannot be opened: {reason}. Give another folder.") from error
    if lacks:
        what = "lacks" if is_folder else ("is no folder" if is_there else "is not there") + ". It should hold"
        raise CheckpointError(
            f"{shown_path(folder)} {what}: {some_of(lacks, len(lacks))}. They are in the repository {SOURCE}: "
            "download them into that folder. Give the folder that has all of them."
        )
