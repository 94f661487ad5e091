"""umT5 and its tokenizer: a prompt becomes embeddings for the DiT."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

END_OF_TEXT = 1
Tokenizer = Callable[[str], list[int]]
"""Cleaned text -> token ids without padding, the end token included."""


def clean_prompt(text: str) -> str:
    """Repair mis-decoded characters, undo HTML entities and fold white space, as the reference does.

    Full-width characters become ASCII, also the commas of the Chinese negative prompt.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The official tokenizer folder (`google/umt5-xxl`).

    Raises:
        CheckpointError: if it is missing or incomplete.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise CheckpointError(
            f"{folder} holds no tokenizer (tokenizer.json or spiece.model). "
            "Copy the folder google/umt5-xxl of the official checkpoint next to the text encoder."
        )
    if not (folder / "tokenizer.json").is_file():
        return tokenizer_from_sentencepiece((folder / "spiece.model").read_bytes(), str(folder / "spiece.model"))
    from tokenizers import Tokenizer as FastTokenizer

    try:
        fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises a bare Exception for any damage
        raise CheckpointError(f"{folder / 'tokenizer.json'} is damaged: {error}. Download it again.") from error
    fast.no_padding()
    fast.no_truncation()
    return lambda text: fast.encode(text).ids


def tokenizer_from_sentencepiece(model: bytes, origin: str) -> Tokenizer:
    """A sentencepiece model, as ComfyUI's umT5 files carry it in the tensor `spiece_model`.

    Raises:
        CheckpointError: if it is damaged.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise CheckpointError(f"the tokenizer in {origin} is damaged: {error}. Download the file again.") from error
    return lambda text: [*pieces.encode(text), END_OF_TEXT]


class TextEncoder(nn.Module):
    """The encoder half of umT5 (transformers), with the tokenizer that came with its weights.

    Args:
        sizes: arguments of transformers' UMT5Config; the rest is fixed for the family.
        tokenizer: None where only token ids are encoded.
        max_tokens: longer prompts are cut, the end token kept.
    """

    def __init__(self, sizes: dict[str, Any], tokenizer: Tokenizer | None = None, max_tokens: int = 512):
        super().__init__()
        from transformers import UMT5Config, UMT5EncoderModel  # slow to import

        fixed = {"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6}
        self.network = UMT5EncoderModel(UMT5Config(**fixed | sizes, dropout_rate=0.0)).eval()
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    @property
    def table(self) -> nn.Embedding:
        """Token -> embedding, a fifth of the weights. It may lie elsewhere than the layers compute."""
        return self.network.shared

    @property
    def layers(self) -> nn.ModuleList:
        """In the order in which they compute."""
        return self.network.encoder.block

    @property
    def device(self) -> torch.device:
        """Where the layers compute."""
        return self.network.encoder.final_layer_norm.weight.device

    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """B L integers, B L (1 = token, 0 = padding) -> B L E."""
        embedded = self.table(ids.to(self.table.weight.device)).to(self.device)
        return self.network(inputs_embeds=embedded, attention_mask=mask.to(self.device)).last_hidden_state

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids of one prompt, cut to `max_tokens`."""
        if self.tokenizer is None:
            raise CheckpointError(
                "this text encoder came without a tokenizer. Put the folder google/umt5-xxl of the official checkpoint "
                "next to the file, or use ComfyUI's umT5 file, which carries its own."
            )
        ids = self.tokenizer(clean_prompt(prompt))
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], END_OF_TEXT]

    def encode(self, prompt: str) -> Tensor:
        """A prompt -> 1 L E, one row per token and no padding."""
        ids = torch.tensor([self.tokenize(prompt)])
        return self.encode_ids(ids, torch.ones_like(ids))
