"""Where ComfyUI keeps models and inputs: what the menus offer, and which file a name in them stands for."""

import hashlib
import os
from pathlib import Path
from typing import Any

import folder_paths

from ...wan_s2v_core.assets import CHECKPOINT, embedded
from ...wan_s2v_core.config import DEMO, ModelRecipe
from ...wan_s2v_core.errors import ConfigError, shown
from ...wan_s2v_core.io.outside import inside
from ...wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from ...wan_s2v_core.model.loading import files_of
from ...wan_s2v_core.model.official import official_places

OFFICIAL = " (folder)"
"""Ends the name of a folder in the official layout, so that it cannot be taken for a file."""
MODEL_FOLDERS = {
    DIT: "diffusion_models",
    TEXT_ENCODER: "text_encoders",
    SPEECH_ENCODER: "audio_encoders",
    VAE: "vae",
}


def official_folders() -> dict[str, Path]:
    """Folders at any depth of diffusion_models that hold a config.json, by their name in the menus: the path below the
    root, as ComfyUI names files. Where two roots have one of that name, the first root's counts."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(MODEL_FOLDERS[DIT])]
    near = [path.parent.name for root in roots if root.is_dir() for path in root.glob("*/config.json")]
    found = {}
    for name in official_places(listed(DIT), near):
        if folder := next((root / name for root in roots if (root / name / "config.json").is_file()), None):
            found[name + OFFICIAL] = folder
    return found


def listed(kind: str) -> list[str]:
    """ComfyUI's list of the files of a kind; Windows' backslashes become slashes, so that workflows travel."""
    return [name.replace(os.sep, "/") for name in folder_paths.get_filename_list(MODEL_FOLDERS[kind])]


def model_choices(kind: str) -> list[str]:
    """What a loader offers: official folders, files that are named after S2V, the embedded demo, other files."""
    folders = official_folders()
    inside = tuple(name.removesuffix(OFFICIAL) + "/" for name in folders)
    files = [name for name in listed(kind) if not (kind == DIT and name.startswith(inside))]
    likely = [name for name in files if "s2v" in name.lower()] if kind == DIT else []
    return [*folders, *likely, DEMO, *(name for name in files if name not in likely)]


def checkpoint_choices() -> list[str]:
    """Whole checkpoints."""
    return [*official_folders(), DEMO]


def input_choices(*kinds: str) -> list[str]:
    """Files in ComfyUI's input folder of the kinds image, audio and video, and what comes with the pack."""
    root = Path(folder_paths.get_input_directory())
    names = [path.name for path in root.iterdir() if path.is_file()] if root.is_dir() else []
    return [*sorted(folder_paths.filter_files_content_types(names, list(kinds))), DEMO]


def input_path(name: str) -> Path | None:
    """Where ComfyUI's loaders look for a file by the name that they know it by, such as face.png or sub/face.png
    [output]; None where they refuse to: outside of its input, output and temp folders, and in newer versions also
    through a link out of them.
    """
    bare, root = folder_paths.annotated_filepath(str(name))
    path = inside(root or folder_paths.get_input_directory(), bare)
    try:
        if path:
            folder_paths.get_annotated_filepath(str(name))
    except ValueError:
        return None
    return path


def find_input(name: str) -> Path:
    """A file that ComfyUI's loaders will read.

    Raises:
        ConfigError: if it is not there, or `input_path` has none.
    """
    path = input_path(name)
    if path and os.path.isfile(path):
        return path
    bare, root = folder_paths.annotated_filepath(str(name))
    folder = Path(root or folder_paths.get_input_directory())
    found = inside(folder, bare)
    if path is None and found and os.path.isfile(found):
        raise ConfigError(
            f"'{shown(name)}' is a link out of ComfyUI's {folder.name} folder, which this ComfyUI does not follow. "
            "Copy the file itself there."
        )
    raise ConfigError(
        f"'{shown(name)}' is no file in ComfyUI's {folder.name} folder. Upload it there, press R and choose it again."
    )


def find_model(kind: str, name: Any) -> ModelRecipe:
    """The network behind a name in a menu; prompts of the API may hold anything there.

    Raises:
        ConfigError: if it is none of them.
    """
    if name == DEMO:
        return ModelRecipe(kind, str(embedded(CHECKPOINT)))
    folders, choices = official_folders(), model_choices(kind)
    if name not in (*folders, *choices):
        name = str(name).replace("\\", "/")  # as a workflow from Windows may have it
    if folder := folders.get(name):
        return ModelRecipe(kind, str(folder))
    path = folder_paths.get_full_path(MODEL_FOLDERS[kind], name) if name in choices else None
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(MODEL_FOLDERS[kind]))
        raise ConfigError(
            f"{shown(repr(name))} is not among the models in {MODEL_FOLDERS[kind]} (searched: {searched}). Put it "
            "there, press R in ComfyUI and choose it again."
        )
    return ModelRecipe(kind, path)


def stamp_of(*recipes: ModelRecipe) -> str:
    """Changes when the files of networks do, so that replaced ones are loaded again.

    ComfyUI writes it into every file it saves: a digest tells nobody where the models lie.
    """
    return files_stamp(*(file for recipe in recipes for file in files_of(recipe.path, recipe.kind)))


def files_stamp(*files: Path) -> str:
    """Changes when one of the files does."""
    facts = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def temp_folder() -> Path:
    """ComfyUI's own, which it empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder
