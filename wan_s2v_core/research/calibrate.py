"""A dense checkpoint is run on a short input, and its feed-forwards are split into experts by the tokens they see.

What comes of it is a checkpoint with experts, which loads as one that was trained with them.
"""

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..clip_denoiser import clip_plan, sample_clip
from ..conditioning.bundle import S2VConditioning, make_conditioning
from ..conditioning.image import read_picture
from ..config import DEFAULT_NEGATIVE_PROMPT, JsonConfig, SamplingConfig, VideoConfig
from ..errors import ConfigError, shown_path
from ..io.audio import read_recording
from ..memory.attempts import Attempts
from ..model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE, dit_name, official_dit_config, read_weight
from ..model.loading import files_of, find_part
from ..model.official import DIT_STEM
from ..networks import open_checkpoint
from ..pipeline import S2VPipeline, noise_of
from ..prepare import AUTO, plan_loading, usable_device
from ..sampling.clips import ClipTask
from .split import ExpertSplit, check_dense, check_split, plan_split, sampled_tokens, split_config, split_weights

log = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
FEED_FORWARD = "stack.blocks.{}.feed_forward."


@dataclass(frozen=True)
class SplitRequest(JsonConfig):
    """Which dense checkpoint is split into how many experts, and what it is run on for that.

    `precision` and `device` are those of the run; the new checkpoint has the types of the old one.
    """

    checkpoint: str
    out: str
    """The folder to write, which must not be there."""
    experts: int
    audio: str
    image: str
    prompt: str = ""
    device: str = "cpu"
    precision: str = AUTO


@dataclass(frozen=True)
class SplitReport:
    """What was written."""

    path: Path
    split: ExpertSplit
    tokens: int
    """Of each layer: how many were looked at."""
    seconds: float
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        errors = [dict(zip(("top_k", "median", "worst"), row, strict=True)) for row in self.split.top_k_errors()]
        facts = {"path": str(self.path), "experts": self.split.num_experts, "tokens": self.tokens}
        return {**facts, "errors": errors, "seconds": self.seconds}


@torch.inference_mode()
def split_checkpoint(
    request: SplitRequest,
    video: VideoConfig,
    sampling: SamplingConfig,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> SplitReport:
    """Run the dense model on one clip and write it as a checkpoint with experts.

    Raises:
        ConfigError: if the checkpoint has experts already, or cannot be split so, or the folder is there.
    """
    began = time.monotonic()
    networks = open_checkpoint(request.checkpoint, plan_loading(request.precision, usable_device(request.device)))
    config = networks.dit_config()
    check_dense(config)
    check_split(config.feed_forward_width, request.experts)
    out = Path(request.out)
    if out.exists():
        raise ConfigError(f"{shown_path(out)} is there already. Give the name of a folder that is to be made.")
    recording = read_recording(request.audio, 0, video.clip_frames / video.fps)
    picture = read_picture(request.image)
    pipeline = S2VPipeline(networks)
    voice = pipeline.encode_voice(recording)
    texts = pipeline.encode_prompts(request.prompt, DEFAULT_NEGATIVE_PROMPT)
    samples = sample_tokens(pipeline, make_conditioning(picture, voice, *texts, video), sampling, on_step)
    log.info("%d tokens of each of %d feed-forwards were sampled", len(samples[0]), len(samples))
    with pipeline.network(DIT) as model:
        split = plan_split(model, request.experts, samples=samples)
    networks.forget()
    write_checkpoint(Path(request.checkpoint), split, out)
    return SplitReport(out, split, len(samples[0]), time.monotonic() - began)


def sample_tokens(
    pipeline: S2VPipeline, job: S2VConditioning, sampling: SamplingConfig, on_step: Callable[[int, Tensor], None] | None
) -> list[Tensor]:
    """Tokens L E of each feed-forward, from all steps of the first clip."""
    text, negative_text, picture = (value.to(pipeline.device) for value in (job.text, job.negative_text, job.reference))
    task = ClipTask(0, noise_of(job, 0, sampling, pipeline.device), pipeline.encode(picture), None)
    inputs = pipeline.clip_inputs(job, task, text)
    choose = clip_plan(pipeline.networks, task.noise, inputs, sampling)
    planned = Attempts(pipeline.networks, DIT, choose).planned
    with pipeline.network(DIT, planned) as model, sampled_tokens(model) as samples:
        sample_clip(model, inputs, negative_text, task.noise, sampling, on_step)
    return [sample.tokens for sample in samples]


def write_checkpoint(source: Path, split: ExpertSplit, out: Path) -> None:
    """Write an official folder whose DiT has experts; the other networks are links to the files of the old one, or
    copies where there can be no links. The folder appears when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made:
        folder = Path(made) / out.name
        folder.mkdir()
        write_dit(source, split, folder)
        for file in {file for kind in (TEXT_ENCODER, SPEECH_ENCODER, VAE) for file in files_of(source, kind)}:
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file.resolve(), target)
        folder.rename(out)


def link_or_copy(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, target)


def write_dit(source: Path, split: ExpertSplit, folder: Path) -> None:
    """The DiT in shards, with their index and its config.json."""
    places: dict[str, str] = {}
    total, shard = 0, {}

    def write_shard() -> None:
        name = f"{DIT_STEM}-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, value in dit_weights(source, split):
        if sum(held.nbytes for held in shard.values()) + value.nbytes > SHARD_BYTES and shard:
            write_shard()
        shard[dit_name(name)], total = value.contiguous(), total + value.nbytes
    write_shard()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    config = official_dit_config(split_config(find_part(source, DIT).config, split))
    for name, content in ((f"{DIT_STEM}.safetensors.index.json", index), ("config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def dit_weights(source: Path, split: ExpertSplit) -> Iterator[tuple[str, Tensor]]:
    """The DiT's parameters by our names, those of its feed-forwards as experts, in the types of the file."""
    part = find_part(source, DIT)

    def read(name: str) -> Tensor:
        return read_weight(part.found.entries, part.found.naming(name))

    beginnings = tuple(FEED_FORWARD.format(block) for block in range(len(split.layers)))
    for name in part.build().state_dict():
        if not name.startswith(beginnings):
            yield name, read(name)
    for beginning, layer in zip(beginnings, split.layers, strict=True):
        dense = {name: read(beginning + name) for name in ("up.weight", "up.bias", "down.weight", "down.bias")}
        yield from ((beginning + name, value) for name, value in split_weights(dense, layer).items())
