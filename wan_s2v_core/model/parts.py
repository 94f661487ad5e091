"""The networks of a run where they lie on the disk: each is opened once, and described without being loaded."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import S2VModelConfig
from ..errors import CheckpointError, ConfigError
from ..io.digest import FileStamp, file_stamp
from .checkpoint import DIT, LOW_NOISE_DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE, kind_of
from .loading import Part, find_part


class Checkpoint:
    """The networks of a run, each opened when it is first asked about. What is wrong with one is raised then.

    Args:
        paths: kind, or LOW_NOISE_DIT -> file or folder.
    """

    def __init__(self, paths: Mapping[str, str | Path]):
        self.paths = {name: Path(path) for name, path in paths.items()}
        self._parts: dict[str, Part] = {}
        self._known: dict[str, tuple[Any, list[FileStamp]]] = {}
        """Config and stamps of each that has been opened."""

    def part(self, name: str) -> Part:
        """A network, ready to be loaded. It is opened anew where one of its files has been replaced meanwhile: what
        was read of the old one says where tensors lie in it.

        Raises:
            CheckpointError: if it is missing, damaged, or something else.
        """
        if name not in self._parts or stamps_of(self._parts[name]) != self._known[name][1]:
            part = find_part(self.paths[name], kind_of(name))
            self._parts[name] = part
            self._known[name] = part.config, stamps_of(part)
        return self._parts[name]

    def release(self, name: str) -> None:
        """Let go of what a network was read from: it would count as memory of this process. What is known stays."""
        self._parts.pop(name, None)

    def config(self, name: str) -> Any:
        """S2VModelConfig for a DiT, keyword arguments of the network's class for others."""
        return self._facts(name)[0]

    def stamps(self, name: str) -> list[FileStamp]:
        """Of the files of a network, as they were when it was opened: others where one has been replaced."""
        return self._facts(name)[1]

    def _facts(self, name: str) -> tuple[Any, list[FileStamp]]:
        if name not in self._known:
            self.part(name)
        return self._known[name]

    def check(self) -> None:
        """Whether the networks fit each other.

        Raises:
            CheckpointError: if one is missing, or voice or text are of another width than the DiT reads.
            ConfigError: if there is a second DiT that is not like the first.
        """
        text, speech, _ = (self.config(kind) for kind in (TEXT_ENCODER, SPEECH_ENCODER, VAE))
        check_fit(self.config(DIT), text["d_model"], speech["hidden_size"], speech["num_hidden_layers"] + 1)
        self.check_pair()

    def check_pair(self) -> None:
        """Raises ConfigError unless a DiT for low noise, where there is one, is built like the one for high noise."""
        if LOW_NOISE_DIT not in self.paths:
            return
        high, low = self.config(DIT), self.config(LOW_NOISE_DIT)
        names = [field.name for field in fields(high) if getattr(high, field.name) != getattr(low, field.name)]
        if names:
            told = ", ".join(f"{name} {getattr(high, name)} and {getattr(low, name)}" for name in names)
            raise ConfigError(
                f"the models for high and low noise differ in {told}. Use two that were trained as a pair, or one "
                "alone."
            )


def stamps_of(part: Part) -> list[FileStamp]:
    """Of its files as they are now; those that are gone are left out."""
    return [file_stamp(file) for file in part.weights.files if file.exists()]


def check_fit(dit: S2VModelConfig, text_width: int, audio_width: int, audio_layers: int) -> None:
    """Raises CheckpointError if the DiT reads other embeddings than the encoders give."""
    for what, given, wanted in (
        ("the text encoder gives embeddings of width", text_width, dit.text_width),
        ("the audio encoder gives features of width", audio_width, dit.audio_width),
        ("the audio encoder gives layers", audio_layers, dit.audio_layers),
    ):
        if given != wanted:
            raise CheckpointError(f"{what} {given}, the DiT reads {wanted}. Use the parts that came with the DiT.")
