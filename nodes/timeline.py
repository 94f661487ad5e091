"""What will be made, told to the page before and after a run: the plan of the clips, and how loud the voice is."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web
from server import PromptServer

from ..wan_s2v_core.assets import VOICE, embedded
from ..wan_s2v_core.conditioning.bundle import S2VConditioning
from ..wan_s2v_core.conditioning.timeline import Loudness, expected_timeline, loudness, loudness_of, timeline
from ..wan_s2v_core.config import DEMO, VideoConfig
from ..wan_s2v_core.errors import ConfigError, WanS2VError, shown
from ..wan_s2v_core.io.audio import sound_blocks
from .bridge.folders import input_path

ROUTE = "/wan_s2v/timeline"
LONGEST_SECONDS = 3600
LARGEST_NUMBER = 2**31
READER = ThreadPoolExecutor(1, "wan_s2v_timeline")
"""Reads one recording at a time, beside the server's own thread."""


class OutsideError(ConfigError):
    """A name that leads out of ComfyUI's folders."""


def timeline_of(made: S2VConditioning) -> dict[str, Any]:
    """The timeline of what the sampler is given."""
    return timeline(made.plan, made.video.fps, made.recording.seconds, loudness_of(made.recording))


def add_route() -> None:
    """GET /wan_s2v/timeline: the timeline of a recording in the input folder, as JSON.

    Takes `audio`, the value of Load Audio or of Talking Video's voice, or `demo`, and inputs of Encode Audio and
    Conditioning by their names. What cannot be is answered with {"error": message}, for the node to show.
    """
    PromptServer.instance.routes.get(ROUTE)(answer)


async def answer(request: web.Request) -> web.Response:
    try:
        found = await asyncio.get_running_loop().run_in_executor(READER, asked_timeline, dict(request.query))
    except OutsideError as error:
        return web.json_response({"error": str(error)}, status=403)
    except WanS2VError as error:
        return web.json_response({"error": str(error)})
    return web.json_response(found)


def asked_timeline(query: Mapping[str, str]) -> dict[str, Any]:
    """The timeline for the inputs in a query; those that are missing have the nodes' defaults.

    Raises:
        OutsideError: if the recording is not one of ComfyUI's.
        WanS2VError: for what a run would refuse too.
    """
    video = VideoConfig(
        fps=number(query, "fps", float, 16.0),
        clip_frames=number(query, "clip_frames", int, 80),
        timing=query.get("timing", "aligned"),
        clip_plan=query.get("clip_plan", "audio"),
        starts_from_reference=query.get("start_from_picture") == "true",
        clips=number(query, "max_clips", int, 0) or None,
    )
    start, seconds = number(query, "start_seconds", float, 0.0), number(query, "seconds", float, 0.0)
    if "demo" in query or query.get("audio") == DEMO:
        name, path = VOICE, embedded(VOICE)
    else:
        name = query.get("audio", "")
        path = path_of(name)
    try:
        facts = path.stat()
        stamp = (facts.st_mtime_ns, facts.st_size)
    except (OSError, ValueError):
        stamp = None
    try:
        return expected_timeline(read_loudness(path, stamp), start, seconds or None, video)
    except WanS2VError as error:  # where the server keeps its files is not for a page to know
        raise ConfigError(str(error).replace(str(path), name)) from error


def number(query: Mapping[str, str], name: str, kind: Callable[[str], Any], default: Any) -> Any:
    """Raises ConfigError unless it is one that a widget could hold."""
    try:
        found = kind(query[name]) if name in query else default
        if isinstance(found, int) and abs(found) >= LARGEST_NUMBER:
            raise ValueError
        return found
    except ValueError:
        raise ConfigError(f"{name}={shown(repr(query[name]))} is no number. Use one such as {default}.") from None


def path_of(name: str) -> Path:
    """Where Load Audio would find a file.

    Raises:
        OutsideError: if that is none of ComfyUI's folders.
    """
    path = input_path(name)
    if path is None:
        raise OutsideError(f"audio='{shown(name)}' is not inside ComfyUI's input folder. Upload it with Load Audio.")
    return path


@lru_cache(8)
def read_loudness(path: Path, stamp: tuple[int, int] | None) -> Loudness:
    """How loud a file is. `stamp` makes a changed file another one."""
    return loudness(sound_blocks(path), LONGEST_SECONDS)
