"""What encoders made of a text or a voice, kept on disk by what it was made from."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .weights import open_weights

log = logging.getLogger(__name__)


class EncodingStore:
    """A folder with one safetensors file for each encoding. Any of them may be deleted at any time.

    Args:
        folder: made if it is not there.
    Raises:
        ConfigError: if it cannot be used.
    """

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"encodings cannot be kept in {folder}: {error.strerror or error}. Give a folder that can be written."
            ) from error
        self.folder = folder

    def get(self, what: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """An encoding of that key: read where it is there, else made and kept. A damaged file is made anew.

        Args:
            what: begins the file's name.
            key: of everything that shapes it, see `digest.digest_of`.
        """
        path = self.folder / f"{what}-{key[:32]}.safetensors"
        if path.exists():
            try:
                found = {name: entry.read() for name, entry in open_weights(path).entries.items()}
                log.info("%s: as kept in %s", what, path)
                return found
            except CheckpointError as error:
                log.warning("%s, what was kept, is made anew: %s", what, error)
        made = make()
        self._keep(path, made)
        return made

    def _keep(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Write a file whole or not at all; a run does not fail for want of room."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            log.warning("%s is not kept: %s", path, error)
        finally:
            partial.unlink(missing_ok=True)
