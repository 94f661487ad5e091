"""Networks built from weights files: made without memory, then filled tensor by tensor, so nothing is held twice."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import S2VModelConfig
from ..errors import CheckpointError, shown, shown_path
from ..io.outside import foreign_parser, parse_json, read_json
from ..io.weights import Weights, open_shards, open_weights
from .audio_encoder import SpeechEncoder
from .checkpoint import (
    DIT,
    PART_LABELS,
    SPEECH_ENCODER,
    TEXT_ENCODER,
    TIED_TEXT_NAMES,
    TOKENIZER_TENSOR,
    VAE,
    NameReport,
    Recognized,
    audio_layers,
    check_counts,
    compare_names,
    dit_config,
    infer_dit_config,
    infer_speech_settings,
    infer_text_sizes,
    infer_vae_sizes,
    read_stored,
    read_weight,
    recognize,
    speech_config,
)
from .dit import S2VTransformer
from .official import DIT_STEM, OFFICIAL_FILES, TOKENIZER_FOLDER
from .text_encoder import TextEncoder, Tokenizer, tokenizer_from_folder, tokenizer_from_sentencepiece
from .vae import VideoVAE

log = logging.getLogger(__name__)

WRAPPED = "network."
"""Where our encoders and VAE keep the library's network."""
TRANSFORMERS_STEMS = ("model", "pytorch_model")
"""File names beside which transformers keeps a config.json."""


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint, found and described but not loaded."""

    weights: Weights
    found: Recognized
    config: Any
    """S2VModelConfig for the DiT; keyword arguments of the network's class otherwise."""

    @property
    def kind(self) -> str:
        return self.found.part

    def build(self) -> nn.Module:
        """The network without weights, on the meta device.

        Raises:
            CheckpointError: if its sizes do not make a network.
        """
        cure = "Use the released file and its own config.json."
        with foreign_parser(self.weights.path, cure, CheckpointError, f"has sizes of no {PART_LABELS[self.kind]}"):
            return self._build()

    def _build(self) -> nn.Module:
        with torch.device("meta"):
            if self.kind == DIT:
                return S2VTransformer(self.config)
            if self.kind == VAE:
                return VideoVAE(**self.config)
            return TextEncoder(self.config) if self.kind == TEXT_ENCODER else SpeechEncoder(self.config)

    def compare(self, network: nn.Module) -> NameReport:
        """How the names and shapes in the file meet those of the network."""
        shapes = {name.removeprefix(WRAPPED): tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return compare_names(self.found, shapes)


def find_part(path: str | Path, wanted: str | None = None) -> Part:
    """Open a weights file, or the folder of a network or a whole checkpoint, and tell what it is.

    Args:
        wanted: the part that must be there; a folder is searched for it.
    Raises:
        CheckpointError: if it is missing, damaged, or something else.
    """
    path = there(path)
    if path.is_dir() and wanted in OFFICIAL_FILES:
        path = _companion(path, wanted)
    part = describe(_open_folder(path, wanted) if path.is_dir() else _open_file(path))
    if wanted and part.kind != wanted:
        raise CheckpointError(
            f"{shown_path(path)} is a {PART_LABELS[part.kind]}, not a {PART_LABELS[wanted]}. Choose another file."
        )
    return part


def there(path: str | Path) -> Path:
    """A path from the root, of something that is there.

    Raises:
        CheckpointError: if it is not, or is no name of a file.
    """
    try:
        whole = Path(path).resolve()
        if whole.exists():
            return whole
        reason = "is not there"
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        reason = f"cannot be opened ({shown(getattr(error, 'strerror', None) or error)})"
    raise CheckpointError(f"{shown_path(path)} {reason}. Give a weights file or a checkpoint folder.")


def files_of(path: str | Path, kind: str) -> list[Path]:
    """The files that a network is read from, without opening them; what else lies in an official folder is left out."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    places = [path / name for name in OFFICIAL_FILES.get(kind, ()) if (path / name).exists()] or [path]
    patterns = (f"{DIT_STEM}*", "model*.safetensors*", "pytorch_model.bin", "config.json")
    files = [file for place in places for file in ((place,) if place.is_file() else _matching(place, patterns))]
    if kind == TEXT_ENCODER:
        files += _matching(path / TOKENIZER_FOLDER, ("*",))
    return sorted(file for file in files if file.is_file())


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern)]


def describe(weights: Weights) -> Part:
    """Tell what opened weights are and how big their network is.

    Raises:
        CheckpointError: if they are of another model, or lack tensors that show its sizes.
    """
    found = recognize(weights)
    try:
        config = _dit_config(weights, found) if found.part == DIT else _encoder_config(weights, found)
    except KeyError as error:
        raise CheckpointError(
            f"{shown_path(weights.path)} looks like a {PART_LABELS[found.part]} but has no {error}. Download it again."
        ) from error
    except CheckpointError as error:
        if str(weights.path) in str(error):
            raise
        raise CheckpointError(f"{shown_path(weights.path)}: {error}") from error
    except (IndexError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{shown_path(weights.path)} looks like a {PART_LABELS[found.part]}, but its tensors have shapes of none. "
            "Use another file."
        ) from error
    return Part(weights, found, config)


def _companion(folder: Path, wanted: str) -> Path:
    """Where an official folder keeps a part that is not the DiT; the folder itself if it is no official one."""
    names = OFFICIAL_FILES[wanted]
    if found := [folder / name for name in names if (folder / name).exists()]:
        return found[0]
    if any(folder.glob(f"{DIT_STEM}*")):
        raise CheckpointError(
            f"{shown_path(folder)} has the DiT but no {PART_LABELS[wanted]} ({' or '.join(names)}). "
            "Download it there, or choose a file elsewhere."
        )
    return folder


def _open_folder(folder: Path, wanted: str | None) -> Weights:
    if any(folder.glob(f"{DIT_STEM}*")):
        return open_shards(folder, DIT_STEM)
    if any(folder.glob("model*.safetensors*")):
        return open_shards(folder, "model")
    if (folder / "pytorch_model.bin").is_file():
        return open_weights(folder / "pytorch_model.bin")
    looked = ", ".join((*OFFICIAL_FILES.get(wanted, ()), f"{DIT_STEM}*.safetensors", "model.safetensors"))
    raise CheckpointError(
        f"{shown_path(folder)} holds no weights. Looked for: {looked}. Point to the folder that has them."
    )


def _open_file(path: Path) -> Weights:
    if shard := re.search(r"-\d{5}-of-(\d{5})\.safetensors$", path.name):
        raise CheckpointError(
            f"{shown_path(path)} is one of {int(shard[1])} shards. Point to its folder, which holds all of them."
        )
    return open_weights(path)


def _dit_config(weights: Weights, found: Recognized) -> S2VModelConfig:
    """From the folder's config.json; for a file from its metadata, a JSON beside it, or its shapes."""
    folder = weights.files[0].parent
    if weights.path.is_dir() or weights.path.stem == DIT_STEM:
        official = read_json(folder / "config.json", CheckpointError)
    elif "config" in weights.metadata:
        official = parse_json(weights.metadata["config"], f"the config in {weights.path}", CheckpointError)
    else:
        beside = weights.path.with_suffix(".json")
        official = read_json(beside, CheckpointError).get("config") if beside.exists() else None
    if not isinstance(official, dict):
        return infer_dit_config(found.shape)
    config = dit_config(official)
    check_counts({"num_layers x num_experts": config.blocks * max(1, config.num_experts)}, len(found.entries))
    return replace(config, audio_layers=audio_layers(found.shape))


def _encoder_config(weights: Weights, found: Recognized) -> dict[str, Any]:
    if found.part == VAE:
        return infer_vae_sizes(found.shape)
    if found.part == TEXT_ENCODER:
        return infer_text_sizes(found.shape)
    config_file = weights.files[0].parent / "config.json"
    if weights.files[0].stem in TRANSFORMERS_STEMS and config_file.exists():
        return speech_config(read_json(config_file, CheckpointError))
    return infer_speech_settings(found.shape)


OnTensor = Callable[[str], None]
"""Called with the name of each parameter that has got its value."""


def fill(
    network: nn.Module,
    part: Part,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    on_tensor: OnTensor | None = None,
) -> None:
    """Give a network on the meta device its weights, one tensor at a time.

    Raises:
        CheckpointError: if a tensor is missing, has another shape, or is refused by the module that stores it.
    """
    report = part.compare(network)
    if report.missing or report.wrong_shape:
        what = "lacks" if report.missing else "has other shapes for"
        names = report.missing or report.wrong_shape
        raise CheckpointError(
            f"{shown_path(part.weights.path)} {what} {len(names)} of {report.wanted} tensors, such as {names[0]}. "
            "The file is incomplete or its config is another model's: download both again."
        )
    if report.unexpected:
        log.warning(
            "%s: %d tensors are not used, such as %s",
            part.weights.path,
            len(report.unexpected),
            shown(report.unexpected[0]),
        )
    warn_of_types(part)
    for name in list(network.state_dict()):
        if (inner := name.removeprefix(WRAPPED)) in TIED_TEXT_NAMES:
            continue
        theirs, target = part.found.naming(inner), type_of(network, name, dtype)
        try:
            if not place_stored(network, name, part.found, theirs, device):
                place(network, name, read_weight(part.found.entries, theirs).to(device), target)
        except CheckpointError as error:
            raise CheckpointError(f"{shown_path(part.weights.path)}: {theirs}: {error}") from error
        if on_tensor:
            on_tensor(name)
    network.requires_grad_(False).eval()
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers())), "a tensor has no name in the file"
    log.info("%s: %d tensors as %s on %s", part.weights.path, report.matched, dtype, device)


def warn_of_types(part: Part) -> None:
    """Say that weights are both float16 and bfloat16, of one size: hardly a file is, a damaged one may look so."""
    named = {entry.dtype: name for name, entry in part.found.entries.items()}
    if torch.float16 in named and torch.bfloat16 in named:
        counts = part.weights.dtypes()
        log.warning(
            "%s: %d tensors are float16 and %d bfloat16, such as %s and %s. If pictures are wrong, download it again",
            part.weights.path,
            counts["float16"],
            counts["bfloat16"],
            *(shown(named[dtype]) for dtype in (torch.float16, torch.bfloat16)),
        )


def set_types(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a network on the meta device the types that loading would give it, so that its sizes can be told."""
    for name, value in list(network.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        if not hasattr(module, f"take_{leaf}"):
            place(network, name, value, type_of(network, name, dtype))
    return network


def type_of(network: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that a network keeps a parameter in, where products are computed in `dtype`."""
    keeps = getattr(network, "keeps_full_precision", lambda name: False)
    return torch.float32 if keeps(name) else dtype


def place(network: nn.Module, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Give a network one of its parameters.

    A module that stores a parameter in its own way has a method `take_weight(value)`, or `take_` and whatever the
    parameter is called. It is given the value as the file has it, since rounding twice costs accuracy.
    """
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    if take := getattr(module, f"take_{leaf}", None):
        take(value)
    else:
        setattr(module, leaf, nn.Parameter(value.to(dtype), requires_grad=False))
    if name == "network.shared.weight":  # umT5 looks its tokens up through a second name
        network.network.encoder.embed_tokens.weight = network.network.shared.weight


def place_stored(network: nn.Module, name: str, found: Recognized, theirs: str, device: torch.device | str) -> bool:
    """Give a network one of its parameters as 8-bit values with scales, the way the file has it; whether that was so.

    For modules with a method `take_scaled_` and whatever the parameter is called: multiplying the values out and
    rounding them again would cost accuracy.
    """
    owner, _, leaf = name.rpartition(".")
    take = getattr(network.get_submodule(owner), f"take_scaled_{leaf}", None)
    if take is None or (stored := read_stored(found.entries, theirs)) is None:
        return False
    take(*(value.to(device) for value in stored))
    return True


def load(
    path: str | Path,
    kind: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Find one network and load it; see `load_part`."""
    return load_part(find_part(path, kind), dtype, device, prepare)


def load_part(
    part: Part,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    prepare: Callable[[nn.Module], None] | None = None,
    watch: Callable[[nn.Module, Weights], OnTensor] | None = None,
) -> nn.Module:
    """Build and fill one network. The typed functions below are for callers.

    Args:
        prepare: changes the network before it has weights, such as which modules store them and how.
        watch: given the network before it has weights, and where they come from -> what is called as they come.
    """
    is_text = part.kind == TEXT_ENCODER
    tokenizer = find_tokenizer(part) if is_text else None  # missing files are told before long loading
    network = part.build()
    if prepare:
        prepare(network)
    fill(network, part, dtype, device, watch and watch(network, part.weights))
    if tokenizer:
        network.tokenizer = tokenizer
    return network


def load_transformer(path: str | Path, dtype=torch.bfloat16, device="cpu", prepare=None) -> S2VTransformer:
    """The S2V DiT from an official folder or a single file. `prepare`: as for `load`."""
    return load(path, DIT, dtype, device, prepare)


def load_vae(path: str | Path, dtype=torch.float32, device="cpu") -> VideoVAE:
    """The video VAE from an official folder or a single file."""
    return load(path, VAE, dtype, device)


def load_audio_encoder(path: str | Path, dtype=torch.float32, device="cpu") -> SpeechEncoder:
    """wav2vec 2.0 from an official folder, its own folder or a single file."""
    return load(path, SPEECH_ENCODER, dtype, device)


def load_text_encoder(path: str | Path, dtype=torch.bfloat16, device="cpu") -> TextEncoder:
    """umT5 with its tokenizer, from an official folder or a single file.

    Raises:
        CheckpointError: also if no tokenizer comes with it.
    """
    return load(path, TEXT_ENCODER, dtype, device)


def find_tokenizer(part: Part) -> Tokenizer:
    """The tokenizer inside a umT5 file, or beside it.

    Raises:
        CheckpointError: if there is none, or it is damaged or of another model.
    """
    entries: Mapping = part.found.entries
    rows = part.config["vocab_size"]
    if TOKENIZER_TENSOR in entries:
        model = entries[TOKENIZER_TENSOR].read().to(torch.uint8).numpy().tobytes()
        return tokenizer_from_sentencepiece(model, str(part.weights.path), rows)
    return tokenizer_from_folder(part.weights.files[0].parent / TOKENIZER_FOLDER, rows)
