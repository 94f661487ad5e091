"""umT5 and its tokenizer: a prompt becomes embeddings for the DiT."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, shown_path
from ..io.outside import LARGEST_JSON_BYTES, foreign_parser, read_bytes

END_OF_TEXT = 1
Tokenizer = Callable[[str], list[int]]
"""Cleaned text -> token ids without padding, the end token included."""
PROBE = "A person talks."
AGAIN = "Download it again."


def clean_prompt(text: str) -> str:
    """Repair mis-decoded characters, undo HTML entities and fold white space, as the reference does.

    Full-width characters become ASCII, also the commas of the Chinese negative prompt.
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def tokenizer_from_folder(folder: Path, rows: int | None = None) -> Tokenizer:
    """The official tokenizer folder (`google/umt5-xxl`).

    Args:
        rows: of the table that its tokens are looked up in, where that is known.
    Raises:
        CheckpointError: if it is missing, incomplete, or of another model.
    """
    pieces, fast = folder / "spiece.model", folder / "tokenizer.json"
    if not (fast.exists() or pieces.exists()):
        raise CheckpointError(
            f"{shown_path(folder)} holds no tokenizer (tokenizer.json or spiece.model). "
            "Copy the folder google/umt5-xxl of the official checkpoint next to the text encoder."
        )
    if not fast.exists():
        return tokenizer_from_sentencepiece(read_bytes(pieces, LARGEST_JSON_BYTES, CheckpointError), str(pieces), rows)
    from tokenizers import Tokenizer as FastTokenizer

    content = read_bytes(fast, LARGEST_JSON_BYTES, CheckpointError)
    with foreign_parser(fast, AGAIN, CheckpointError, "is damaged"):
        tokenizer = FastTokenizer.from_buffer(content)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    return checked_tokenizer(lambda text: tokenizer.encode(text).ids, str(fast), size, rows)


def tokenizer_from_sentencepiece(model: bytes, origin: str, rows: int | None = None) -> Tokenizer:
    """A sentencepiece model, as ComfyUI's umT5 files carry it in the tensor `spiece_model`. `rows`: as above.

    Raises:
        CheckpointError: if it is damaged or of another model.
    """
    from sentencepiece import SentencePieceProcessor

    if not model:  # the library takes it for no model at all
        raise CheckpointError(f"the tokenizer in {shown_path(origin)} is damaged: it is empty. {AGAIN}")
    with foreign_parser(origin, AGAIN, CheckpointError, "is a damaged tokenizer"):
        pieces = SentencePieceProcessor(model_proto=model)
    return checked_tokenizer(lambda text: [*pieces.encode(text), END_OF_TEXT], origin, pieces.vocab_size(), rows)


def checked_tokenizer(tokenize: Tokenizer, origin: str, size: int, rows: int | None) -> Tokenizer:
    """The tokenizer, after a look at what it makes of a prompt. `size`: how many tokens it knows.

    Raises:
        CheckpointError: if that is nothing, does not end as umT5's do, or is more than the text encoder has.
    """

    def tokens(text: str) -> list[int]:
        with foreign_parser(origin, AGAIN, CheckpointError, "is a damaged tokenizer"):
            return tokenize(text)

    probe = tokens(PROBE)
    if len(probe) < 2 or probe[-1] != END_OF_TEXT:
        raise CheckpointError(
            f"the tokenizer in {shown_path(origin)} is not umT5's: {PROBE!r} becomes {probe[:9]}. "
            "Use the one that came with the text encoder."
        )
    if rows is not None and max(size, *probe) > rows:
        raise CheckpointError(
            f"the tokenizer in {shown_path(origin)} has {size:,} tokens, the text encoder {rows:,}. "
            "Use the one that came with it."
        )
    return tokens


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
