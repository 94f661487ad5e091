"""A dense checkpoint is run on a short input, and its feed-forwards are split into experts by the tokens they see."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .acceleration.experts.router import check_routing, check_split
from .acceleration.experts.split import ExpertSplit, plan_split, sampled_tokens, save_split, split_path
from .conditioning.bundle import S2VConditioning, make_conditioning
from .conditioning.image import read_picture
from .config import DEFAULT_NEGATIVE_PROMPT, ExpertRouting, JsonConfig, SamplingConfig, VideoConfig
from .errors import ConfigError
from .io.audio import read_recording
from .memory.attempts import Attempts
from .model.checkpoint import DIT
from .pipeline import S2VPipeline, clip_shape, noise_of, open_checkpoint, sample_clip, sampling_plan, usable_device
from .prepare import AUTO, plan_loading
from .sampling.clips import ClipTask
from .sampling.denoise import OnStep
from .sampling.guidance import needed_branches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitRequest(JsonConfig):
    """Which dense checkpoint is split into how many experts, and what it is run on for that.

    `precision` and `device` are those of the run; the split serves all of them.
    """

    checkpoint: str
    experts: int
    audio: str
    image: str
    prompt: str = ""
    device: str = "cpu"
    precision: str = AUTO
    overwrite: bool = False
    """Replace the file of an earlier split."""


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
    request: SplitRequest, video: VideoConfig, sampling: SamplingConfig, on_step: OnStep | None = None
) -> SplitReport:
    """Run the dense model on one clip and write the split of it where runs look for one.

    Raises:
        ConfigError: if the checkpoint has experts already, or cannot be split so, or a file is in the way.
    """
    began = time.monotonic()
    networks = open_checkpoint(request.checkpoint, plan_loading(request.precision, usable_device(request.device)))
    config = networks.dit_config()
    check_routing(config, ExpertRouting(), request.experts)
    check_split(config.feed_forward_width, request.experts)
    path = split_path(request.checkpoint, request.experts)
    if path.exists() and not request.overwrite:
        raise ConfigError(f"{path} is there already, from a run or an earlier split. Give --overwrite to replace it.")
    recording = read_recording(request.audio, 0, video.clip_frames / video.fps)
    picture = read_picture(request.image)
    pipeline = S2VPipeline(networks)
    voice = pipeline.encode_voice(recording)
    texts = pipeline.encode_prompts(request.prompt, DEFAULT_NEGATIVE_PROMPT)
    samples = sample_tokens(pipeline, make_conditioning(picture, voice, *texts, video), sampling, on_step)
    log.info("%d tokens of each of %d feed-forwards were sampled", len(samples[0]), len(samples))
    with pipeline.network(DIT) as model:
        split = plan_split(model, request.experts, samples=samples)
    save_split(split, path)
    return SplitReport(path, split, len(samples[0]), time.monotonic() - began)


def sample_tokens(
    pipeline: S2VPipeline, job: S2VConditioning, sampling: SamplingConfig, on_step: OnStep | None
) -> list[Tensor]:
    """Tokens L E of each feed-forward, from all steps of the first clip."""
    text, negative_text, picture = (value.to(pipeline.device) for value in (job.text, job.negative_text, job.reference))
    task = ClipTask(0, noise_of(job, 0, sampling, pipeline.device), pipeline.encode(picture), None)
    inputs = pipeline.clip_inputs(job, task, text)
    networks, frames = pipeline.networks, task.noise.shape[2]
    shape = clip_shape(networks.dit_config(), job.size_px, frames, 0, job.pose is not None)
    planned = Attempts(networks, DIT, sampling_plan(networks, shape, len(needed_branches(sampling)))).planned
    with pipeline.network(DIT, planned) as model, sampled_tokens(model) as samples:
        sample_clip(model, inputs, negative_text, task.noise, sampling, on_step)
    return [sample.tokens for sample in samples]
