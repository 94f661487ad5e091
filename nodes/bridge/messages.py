"""Progress, previews and lines of text for the page."""

import time
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.utils
from comfy_execution.progress import get_progress_state
from latent_preview import Latent2RGBPreviewer, LatentPreviewer, get_previewer
from server import PromptServer
from torch import Tensor

from ...wan_s2v_core.conditioning.bundle import S2VConditioning
from ...wan_s2v_core.sampling.clips import ClipTask
from ...wan_s2v_core.sampling.preview import colour_factors


def shown_in(node_id: str) -> str:
    """The node on the canvas: another one where a node is part of it."""
    return get_progress_state().dynprompt.get_display_node_id(node_id)


def say(node_id: str, text: str) -> None:
    """Show a line of text in a node on the canvas."""
    PromptServer.instance.send_progress_text(text, shown_in(node_id))


CLIP, TIMELINE = "wan_s2v.clip", "wan_s2v.timeline"
"""Kinds of messages."""


def tell(kind: str, node_id: str, **facts: Any) -> None:
    """Tell the page that queued the prompt about a node on the canvas; web/js/ shows it."""
    server = PromptServer.instance
    server.send_sync(kind, {"node": shown_in(node_id), "prompt_id": server.last_prompt_id, **facts}, server.client_id)


def make_previewer(job: S2VConditioning, task: ClipTask) -> LatentPreviewer:
    """ComfyUI's tiny decoder where its preview method asks for one and `models/vae_approx` has it; else colours."""
    previewer = get_previewer(task.noise.device, comfy.latent_formats.Wan21())
    if previewer and not isinstance(previewer, Latent2RGBPreviewer):
        return previewer
    factors, bias = colour_factors(job.reference, task.reference_latents)
    return Latent2RGBPreviewer(factors.T.tolist(), bias.tolist())


def step_reporter(
    node_id: str, job: S2VConditioning, steps: int, finished: int = 0
) -> Callable[[ClipTask, int, Tensor], None]:
    """Progress over all clips and steps with a preview picture; raises when the user has pressed cancel.

    Args:
        finished: clips of an earlier run; the time that is left is told from those behind them.
    """
    clips = job.clips
    bar, total, began, previewer = comfy.utils.ProgressBar(clips * steps), clips * steps, time.monotonic(), None

    def report(task: ClipTask, step: int, clean: Tensor) -> None:
        nonlocal previewer
        previewer = previewer or make_previewer(job, task)
        done = task.index * steps + step
        left = (time.monotonic() - began) * (total - done) / (done - finished * steps)
        say(node_id, f"clip {task.index + 1} of {clips}, step {step} of {steps}, {left:.0f} s left")
        tell(CLIP, node_id, clip=task.index, clips=clips, step=step, steps=steps)
        middle = clean.shape[2] // 2
        preview = previewer.decode_latent_to_preview_image("JPEG", clean[:, :, middle : middle + 1].float())
        bar.update_absolute(done, total, preview)

    return report


def frame_reporter(frames: int) -> Callable[[int], None]:
    """Progress over the frames of a file; raises when the user has pressed cancel."""
    bar = comfy.utils.ProgressBar(frames)
    return lambda done: bar.update_absolute(done, frames)
