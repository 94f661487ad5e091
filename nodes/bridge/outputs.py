"""New files in ComfyUI's output folder."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...wan_s2v_core.errors import ConfigError, shown
from ...wan_s2v_core.io.locks import sweep
from ...wan_s2v_core.io.outside import check_path, inside
from ...wan_s2v_core.io.video import SPARE_NAME_BYTES


def check_prefix(prefix: str) -> None:
    """Raises ConfigError if a file name prefix leads out of ComfyUI's output folder, or is none for a file."""
    check_path("filename_prefix", prefix, SPARE_NAME_BYTES)
    path = inside(folder_paths.get_output_directory(), prefix)
    if path is None or not Path(prefix).name.strip(". "):
        raise ConfigError(
            f"filename_prefix='{shown(prefix)}' leads out of ComfyUI's output folder. Use a name such as video/talk."
        )
    if not is_followed(path.parent):
        raise ConfigError(
            f"filename_prefix='{shown(prefix)}' goes through a link out of ComfyUI's output folder, which this ComfyUI "
            "does not follow. Use another folder, or start ComfyUI with --output-directory."
        )


def is_followed(folder: Path) -> bool:
    """Whether ComfyUI saves into a folder that is inside its output folder by name: newer versions follow no links out
    of it."""
    within = getattr(folder_paths, "is_within_directory", None)
    return within is None or within(folder_paths.get_output_directory(), str(folder))


@contextlib.contextmanager
def new_output(prefix: str, suffix: str, width_px: int, height_px: int) -> Iterator[tuple[Path, str]]:
    """A new file in ComfyUI's output folder, taken before it is written so that no other server takes its name, and
    its subfolder. It is gone again if what writes it fails.

    Raises:
        ConfigError: if the prefix leads out of that folder, or to a place that cannot be written to.
    """
    check_prefix(prefix)
    root = folder_paths.get_output_directory()
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width_px, height_px)
        for unfinished in sweep(Path(folder), rf"{re.escape(name)}_\d+_"):  # of servers that were killed
            remove_empty(Path(folder) / f"{unfinished}{suffix}")
        while True:
            path = Path(folder) / f"{name}_{counter:05}_{suffix}"
            try:
                path.touch(exist_ok=False)
                break
            except FileExistsError:
                counter += 1
    except OSError as error:
        raise ConfigError(
            f"filename_prefix={shown(prefix)!r} cannot be used ({error.strerror}). Use another name, or make room."
        ) from error
    try:
        yield path, subfolder
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def remove_empty(path: Path) -> None:
    """Remove the file that stood for one under way."""
    with contextlib.suppress(OSError):
        if not path.stat().st_size:
            path.unlink()
