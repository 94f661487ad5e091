"""What encoders made of a text or a voice, kept on disk by what it was made from."""

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import ConfigError
from .locks import sweep
from .records import read_record, write_record

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
        sweep(folder, r"(text|voice)-[0-9a-f]+")

    def get(self, what: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """An encoding of that key: read where it is there, else made and kept. A damaged file is made anew.

        Args:
            what: begins the file's name.
            key: of everything that shapes it, see `digest.digest_of`.
        """
        path, facts = self.folder / f"{what}-{key[:32]}.safetensors", {"what": what, "key": key}
        if (kept := read_record(path, lambda found, _: found.items() >= facts.items())) is not None:
            log.info("%s: as kept in %s", what, path)
            return kept.tensors
        if path.exists():
            log.warning("%s, what was kept in %s, is damaged and is made anew", what, path)
        made = make()
        self._keep(path, made, facts)
        return made

    def _keep(self, path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        """Write a file whole or not at all; a run does not fail for want of room."""
        try:
            write_record(path, tensors, facts)
        except OSError as error:
            log.warning("%s is not kept: %s", path, error)
