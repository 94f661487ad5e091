"""How much memory a run will take, told to the page before it: the plan of each stage, as it would be made now."""

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import comfy.model_management as manager
import folder_paths
from aiohttp import web
from server import PromptServer

from ..wan_s2v_core.acceleration.trials import without_trials
from ..wan_s2v_core.assets import CHECKPOINT, embedded
from ..wan_s2v_core.config import (
    AUTO,
    PRESETS,
    AccelerationPlan,
    MemoryLimits,
    SamplingConfig,
    VideoConfig,
    check_choice,
)
from ..wan_s2v_core.errors import ConfigError, WanS2VError
from ..wan_s2v_core.forecast import JobFacts, StageForecast, forecast
from ..wan_s2v_core.geometry import ClipGeometry
from ..wan_s2v_core.memory.budget import Sizes
from ..wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .bridge.folders import MODEL_FOLDERS, checkpoint_choices, find_model, model_choices
from .bridge.networks import ComfyNetworks, Model
from .encode import CARD, EXACT, MEMORY, TEXT_DEVICES
from .limits import DECIDED, limits_of, of_other_stages
from .timeline import OutsideError, asked_timeline, number

ROUTE = "/wan_s2v/memory"
PLANNER = ThreadPoolExecutor(1, "wan_s2v_memory")
"""Makes one forecast at a time, beside the server's own thread."""
INPUTS = {DIT: "model", TEXT_ENCODER: "text_encoder", SPEECH_ENCODER: "audio_encoder", VAE: "vae"}
"""Names in a query of where each network comes from."""
UNKNOWN_SECONDS = 60.0
"""Of a recording that the page does not know: longer ones are heard in parts of about this length."""
SIDE_STEP_PX = 16
KNOWN_SIZES = 16
SIZES: dict[tuple, Sizes] = {}
"""Of networks that were asked about lately: to measure a large one takes a second."""


class Networks(ComfyNetworks):
    """Those of a run that has not begun. Their sizes are kept here, since no loader keeps their places."""

    def sizes(self, name: str) -> Sizes:
        key = (name, self._made_from(self.models[name].recipe))
        if key not in SIZES:
            SIZES[key] = super().sizes(name)
            while len(SIZES) > KNOWN_SIZES:
                del SIZES[next(iter(SIZES))]
        return SIZES[key]


def add_route() -> None:
    """GET /wan_s2v/memory: what each stage of a run would take now, as JSON. Nothing is loaded.

    Takes `checkpoint` for all networks, or names for one each (model, text_encoder, audio_encoder, vae; stages of
    others are left out), and inputs of the other nodes by their names, except the text encoder's (text_device,
    text_precision), the VAE's of Wan S2V Speed (vae_precision), and `has_pose`. The recording is what
    /wan_s2v/timeline takes, or `seconds` alone. What cannot be is answered with {"error": message}.
    """
    PromptServer.instance.routes.get(ROUTE)(answer)


async def answer(request: web.Request) -> web.Response:
    try:
        found = await asyncio.get_running_loop().run_in_executor(PLANNER, asked_forecast, dict(request.query))
    except OutsideError as error:
        return web.json_response({"error": str(error)}, status=403)
    except WanS2VError as error:
        return web.json_response({"error": without_folders(str(error))})
    for stage in found["stages"]:
        stage["error"] = stage["error"] and without_folders(stage["error"])
    return web.json_response(found)


def without_folders(text: str) -> str:
    """A message without the folders of models: where the server keeps its files is not for a page to know."""
    folders = [folder for name in MODEL_FOLDERS.values() for folder in folder_paths.get_folder_paths(name)]
    for folder in sorted((*folders, str(embedded(CHECKPOINT).parent)), key=len, reverse=True):
        for one in (folder, str(Path(folder).resolve())):
            text = text.replace(one + os.sep, "")
    return text


def asked_forecast(query: Mapping[str, str]) -> dict[str, Any]:
    """The forecast for the inputs in a query; those that are missing have the nodes' defaults.

    Raises:
        OutsideError: if the recording is not one of ComfyUI's.
        WanS2VError: for what a run would refuse too.
    """
    limits, acceleration, job = asked_limits(query), asked_acceleration(query), asked_job(query)
    models = asked_models(query)
    if DIT in models:
        models[DIT] = Model(models[DIT].recipe, acceleration, limits=limits)
    text_device = query.get("text_device", CARD)
    check_choice("text_device", text_device, TEXT_DEVICES)
    options = {  # each node that runs a stage has networks of its own
        (SPEECH_ENCODER,): {},
        (TEXT_ENCODER,): {"on_cpu": text_device == MEMORY, "text_precision": query.get("text_precision", AUTO)},
        (DIT, VAE): {"precision": query.get("precision", AUTO)},
    }
    stages: list[StageForecast] = []
    with without_trials():  # a prompt may be using the GPU
        for kinds, chosen in options.items():
            allowed = limits if DIT in kinds else of_other_stages(limits)
            networks = Networks(*(models[kind] for kind in kinds if kind in models), **chosen, limits=allowed)
            stages += forecast(networks, job)
    return {"device": device_facts(stages), "stages": [stage.to_dict() for stage in stages]}


def device_facts(stages: list[StageForecast]) -> dict[str, Any] | None:
    """The card's name, size, and what a stage may use of it; None without a card."""
    rooms = [stage.room_bytes for stage in stages if stage.room_bytes is not None]
    if not rooms:
        return None
    device = manager.get_torch_device()
    name = manager.get_torch_device_name(device)
    return {"name": name, "total_bytes": int(manager.get_total_memory(device)), "usable_bytes": min(rooms)}


def asked_models(query: Mapping[str, str]) -> dict[str, Model]:
    """The networks that a query names, by kind.

    Raises:
        ConfigError: if one is not in the menus of the loaders.
    """
    names = {kind: query[name] for kind, name in INPUTS.items() if name in query}
    if "checkpoint" in query or not names:
        whole = query.get("checkpoint", checkpoint_choices()[0])
        check_choice("checkpoint", whole, checkpoint_choices())
        names = dict.fromkeys(INPUTS, whole) | names
    for kind, name in names.items():
        if name not in model_choices(kind):
            folder = MODEL_FOLDERS[kind]
            raise ConfigError(f"{INPUTS[kind]}={name!r} is not among the models in {folder}. Press R and choose again.")
    return {kind: Model(find_model(kind, name)) for kind, name in names.items()}


def asked_job(query: Mapping[str, str]) -> JobFacts:
    height, width = number(query, "height", int, 480), number(query, "width", int, 832)
    if query.get("size_rule") != EXACT:  # the picture gives the shape, so only the area counts
        height, width = (-(-side // SIDE_STEP_PX) * SIDE_STEP_PX for side in (height, width))
    geometry = ClipGeometry(number(query, "clip_frames", int, 80))
    VideoConfig(exact_size=(height, width))  # says what is wrong with a size
    guidance = SamplingConfig().guidance_scale
    if preset := query.get("preset"):
        check_choice("preset", preset, PRESETS)
        guidance = PRESETS[preset].guidance_scale
    sampling = SamplingConfig(
        guidance_scale=number(query, "guidance_scale", float, guidance),
        audio_guidance_scale=number(query, "audio_guidance_scale", float, 0.0) or None,
    )
    return JobFacts(height, width, asked_seconds(query), geometry, sampling, query.get("has_pose") == "true")


def asked_seconds(query: Mapping[str, str]) -> float:
    """How long the recording is of which a run hears all or a stretch."""
    if "demo" in query or "audio" in query:
        return asked_timeline(query)["sound_seconds"]
    seconds = number(query, "seconds", float, UNKNOWN_SECONDS) or UNKNOWN_SECONDS
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds={seconds} is no length of a recording. Use one such as {UNKNOWN_SECONDS}.")
    return seconds


def asked_limits(query: Mapping[str, str]) -> MemoryLimits:
    by_hand = (number(query, name, int, DECIDED) for name in ("resident_blocks", "slice_tokens", "vae_tile"))
    limit = number(query, "vram_limit_gb", float, 8.0)
    return limits_of(query.get("profile", AUTO), limit, *by_hand, query.get("weights", AUTO))


def asked_acceleration(query: Mapping[str, str]) -> AccelerationPlan:
    usual = AccelerationPlan()
    return AccelerationPlan(
        attention=query.get("attention", usual.attention),
        sparse_keep=number(query, "sparse_keep", float, usual.sparse_keep),
        fused=query.get("fused", "true") == "true",
        vae=query.get("vae_precision", usual.vae),
    )
