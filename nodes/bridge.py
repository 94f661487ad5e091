"""What ComfyUI offers, for the nodes: folders, progress, interrupt, its memory manager, and the loaded networks."""

import contextlib
import hashlib
import logging
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_management as manager
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_execution.progress import get_progress_state
from latent_preview import Latent2RGBPreviewer, LatentPreviewer, get_previewer
from server import PromptServer
from torch import Tensor, nn

from ..wan_s2v_core.assets import CHECKPOINT, embedded
from ..wan_s2v_core.conditioning.bundle import S2VConditioning
from ..wan_s2v_core.config import DEMO, AccelerationPlan, MemoryLimits, ModelRecipe, S2VModelConfig
from ..wan_s2v_core.errors import ConfigError
from ..wan_s2v_core.io.clip_folders import delete_leftovers, new_folder
from ..wan_s2v_core.io.clip_store import EarlierClips, StoredClips, clips_in, find_earlier, read_settings
from ..wan_s2v_core.memory.budget import WHOLE, Planned, Room, Sizes
from ..wan_s2v_core.memory.networks import load_placed, room_on, sizes_of
from ..wan_s2v_core.memory.placement import Placement
from ..wan_s2v_core.model.checkpoint import DIT, LOW_NOISE_DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from ..wan_s2v_core.model.loading import files_of, find_part
from ..wan_s2v_core.prepare import AUTO, plan_loading
from ..wan_s2v_core.sampling.clips import ClipTask
from ..wan_s2v_core.sampling.preview import colour_factors

log = logging.getLogger(__name__)

OFFICIAL = " (folder)"
"""Ends the name of a folder in the official layout, so that it cannot be taken for a file."""
MODEL_FOLDERS = {
    DIT: "diffusion_models",
    TEXT_ENCODER: "text_encoders",
    SPEECH_ENCODER: "audio_encoders",
    VAE: "vae",
}
CLIPS_FOLDER = "wan_s2v_clips"


def official_folders() -> dict[str, Path]:
    """Subfolders of diffusion_models that hold a config.json, by their name in the menus."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(MODEL_FOLDERS[DIT])]
    found = {path.parent for root in roots if root.is_dir() for path in root.glob("*/config.json")}
    return {folder.name + OFFICIAL: folder for folder in sorted(found)}


def model_choices(kind: str) -> list[str]:
    """What a loader offers: official folders, files that are named after S2V, the embedded demo, other files."""
    folders = official_folders()
    inside = tuple(name.removesuffix(OFFICIAL) + "/" for name in folders)
    names = [name.replace("\\", "/") for name in folder_paths.get_filename_list(MODEL_FOLDERS[kind])]
    files = [name for name in names if not name.startswith(inside)]
    likely = [name for name in files if "s2v" in name.lower()] if kind == DIT else []
    return [*folders, *likely, DEMO, *(name for name in files if name not in likely)]


def checkpoint_choices() -> list[str]:
    """Whole checkpoints."""
    return [*official_folders(), DEMO]


def input_choices(*kinds: str) -> list[str]:
    """Files in ComfyUI's input folder of the kinds image, audio and video, and what comes with the pack."""
    root = Path(folder_paths.get_input_directory())
    names = [path.name for path in root.iterdir() if path.is_file()] if root.is_dir() else []
    return [*sorted(folder_paths.filter_files_content_types(names, list(kinds))), DEMO]


def find_input(name: str) -> Path:
    """A file by the name that ComfyUI's loaders know it by, such as face.png or sub/face.png [output].

    Raises:
        ConfigError: if it is not there, or not in ComfyUI's input, output or temp folder.
    """
    bare, root = folder_paths.annotated_filepath(str(name))
    root = os.path.abspath(root or folder_paths.get_input_directory())
    path = os.path.abspath(os.path.join(root, bare))
    if not path.startswith(root + os.sep) or not os.path.isfile(path):
        raise ConfigError(
            f"{name!r} is no file in ComfyUI's {Path(root).name} folder. Upload it there, press R and choose it again."
        )
    return Path(path)


def find_model(kind: str, name: Any) -> ModelRecipe:
    """The network behind a name in a menu; prompts of the API may hold anything there.

    Raises:
        ConfigError: if it is none of them.
    """
    if name == DEMO:
        return ModelRecipe(kind, str(embedded(CHECKPOINT)))
    if folder := official_folders().get(str(name)):
        return ModelRecipe(kind, str(folder))
    path = folder_paths.get_full_path(MODEL_FOLDERS[kind], name) if name in model_choices(kind) else None
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(MODEL_FOLDERS[kind]))
        raise ConfigError(
            f"{name!r} is not among the models in {MODEL_FOLDERS[kind]} (searched: {searched}). Put it there, press R "
            "in ComfyUI and choose it again."
        )
    return ModelRecipe(kind, path)


def stamp_of(*recipes: ModelRecipe) -> str:
    """Changes when the files of networks do, so that replaced ones are loaded again.

    ComfyUI writes it into every file it saves: a digest tells nobody where the models lie.
    """
    return files_stamp(*(file for recipe in recipes for file in files_of(recipe.path, recipe.kind)))


def files_stamp(*files: Path) -> str:
    """Changes when one of the files does."""
    facts = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


class Placed(nn.Module):
    """A network as ComfyUI's ModelPatcher manages it: with the attributes it sets, and a quick way back."""

    def __init__(self, placement: Placement):
        super().__init__()
        self.network, self.device, self.placement = placement.network, torch.device("cpu"), placement

    def to(self, device: torch.device, *args: Any, **options: Any) -> "Placed":
        if torch.device(device).type == "cpu":
            self.placement.take_back()
            return self
        return super().to(device, *args, **options)


class WholePatcher(comfy.model_patcher.ModelPatcher):
    """ComfyUI moves our networks as a whole. Where only layers of one are to be on the card, they move themselves
    (`memory.block_swap`), and ComfyUI is asked for the room alone."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, EVERYTHING, force_patch_weights)

    def partially_unload(self, device_to, memory_to_free=0, *args, **options):
        freed = self.loaded_size()
        self.detach()
        return freed


EVERYTHING = 1e32
"""ComfyUI's own number for no limit of memory."""


class Place:
    """Where the network of one file is kept."""

    def __init__(self):
        self.made_from: tuple | None = None
        self.patcher: WholePatcher | None = None
        self.sizes: tuple[tuple, Sizes] | None = None
        """What they were measured for, and they."""


PLACES: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
"""(kind, path) -> Place. A network lives as long as ComfyUI keeps the output of a loader that names it."""


class Model:
    """What a loader gives: a recipe, and the place of its network, which all that name that file share.

    Args:
        acceleration: how the networks of a run are made faster, where this is its DiT.
        accelerated_in: the node that says so; it shows what came of it.
        limits: what memory a run may use, where this is its DiT.
    """

    def __init__(
        self,
        recipe: ModelRecipe,
        acceleration: AccelerationPlan = AccelerationPlan(),  # noqa: B008  (frozen)
        accelerated_in: str | None = None,
        limits: MemoryLimits = MemoryLimits(),  # noqa: B008  (frozen)
    ):
        self.recipe, self.acceleration, self.accelerated_in, self.limits = recipe, acceleration, accelerated_in, limits
        self.place = PLACES.setdefault((recipe.kind, recipe.path), Place())

    def with_acceleration(self, plan: AccelerationPlan, node_id: str) -> "Model":
        """The same network, in the same place, under another plan."""
        return Model(self.recipe, plan, node_id, self.limits)

    def with_limits(self, limits: MemoryLimits) -> "Model":
        """The same network, in the same place, with other limits."""
        return Model(self.recipe, self.acceleration, self.accelerated_in, limits)


class ComfyNetworks:
    """Networks of loaders, each placed on the card by ComfyUI's memory manager when its stage begins.

    All of them are made faster as the DiT among them says.

    Args:
        precision: of the DiT and the text encoder; the audio encoder stays float32.
        offload: take each network off the card when its stage is over; otherwise it stays until ComfyUI needs room.
        on_cpu: leave all of them in main memory.
        split_experts: into so many experts the feed-forwards of a dense DiT are split; 0 leaves them whole.
        low_noise: a second DiT, for steps of low noise.
        text_precision: of the text encoder, see `prepare.TEXT_PRECISIONS`.
    """

    def __init__(
        self,
        *models: Model,
        precision: str = AUTO,
        offload: bool = True,
        on_cpu: bool = False,
        split_experts: int = 0,
        low_noise: Model | None = None,
        text_precision: str = AUTO,
    ):
        self.models = {model.recipe.kind: model for model in models}
        if low_noise is not None:
            self.models[LOW_NOISE_DIT] = low_noise
        card = manager.get_torch_device()
        self.device = torch.device("cpu") if on_cpu else card
        self.acceleration = self.models[DIT].acceleration if DIT in self.models else AccelerationPlan()
        planned = plan_loading(precision, card, split_experts, self.acceleration, text_precision)
        self.loading = replace(planned, device=self.device)
        self.limits = self.models[DIT].limits if DIT in self.models else MemoryLimits()
        self.offload = offload

    @contextlib.contextmanager
    def use(self, name: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        patcher = self._patcher(name, planned.plan.locks and planned.plan.swaps)
        if planned.plan.swaps:
            patcher.detach()
            manager.free_memory(planned.bytes, self.device)
            try:
                with patcher.model.placement.on(self.device, planned.plan) as network:
                    yield network
            finally:
                manager.soft_empty_cache()
            return
        manager.load_models_gpu([patcher], memory_required=planned.working_bytes, force_full_load=True)
        try:
            yield patcher.model.network
        finally:
            if self.offload and self.device.type != "cpu":
                patcher.detach()
                manager.soft_empty_cache()

    def room(self, name: str) -> Room:
        """What is free, and what ComfyUI can make free by taking other networks off the card."""
        loaded = [entry.model for entry in manager.current_loaded_models if entry.device == self.device]
        returnable = sum(patcher.loaded_size() for patcher in loaded if patcher is not None)
        return room_on(self.device, self.limits, returnable)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    def dit_config(self) -> S2VModelConfig:
        return find_part(self.models[DIT].recipe.path, DIT).config

    def sizes(self, name: str) -> Sizes:
        model = self.models[name]
        made_from = self._made_from(model.recipe)
        if model.place.sizes is None or model.place.sizes[0] != made_from:
            model.place.sizes = made_from, sizes_of(model.recipe.path, model.recipe.kind, self.loading)
        return model.place.sizes[1]

    def recover(self) -> None:
        manager.unload_all_models()
        manager.soft_empty_cache()

    @property
    def paths(self) -> dict[str, Path]:
        """Where each network comes from."""
        return {name: Path(model.recipe.path) for name, model in self.models.items()}

    def _patcher(self, name: str, packs: bool) -> WholePatcher:
        """The network under ComfyUI's management, loaded unless it is there as it is wanted. `packs`: see
        `load_placed`."""
        recipe, place, cpu = self.models[name].recipe, self.models[name].place, torch.device("cpu")
        if place.made_from != self._made_from(recipe):
            place.made_from = place.patcher = None  # two of one network would take twice the memory
            placement = load_placed(recipe.path, recipe.kind, self.loading, packs)
            place.patcher = WholePatcher(Placed(placement), self.device, cpu)
            place.made_from = self._made_from(recipe)  # loading may have written a file of split experts
        return place.patcher

    def _made_from(self, recipe: ModelRecipe) -> tuple:
        """Changes when a network has to be loaded again."""
        return stamp_of(recipe), self.loading.concerning(recipe.kind, recipe.path)


check_interrupt = manager.throw_exception_if_processing_interrupted
"""Raises ComfyUI's own exception when the user has pressed cancel."""


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


def latent_of(latents: Tensor) -> dict[str, Tensor]:
    """Normalised latents of ours as LATENT, which carries them as the VAE gives them."""
    return {"samples": comfy.latent_formats.Wan21().process_out(latents.float().cpu())}


def temp_folder() -> Path:
    """ComfyUI's own, which it empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clips_root() -> Path:
    return Path(folder_paths.get_output_directory()) / CLIPS_FOLDER


def find_clips(keys: Sequence[str]) -> EarlierClips | None:
    """The longest beginning of a video in the output folder."""
    root = clips_root()
    return find_earlier(sorted(root.iterdir()), keys) if root.is_dir() else None


def clips_folder(earlier: EarlierClips | None) -> Path:
    """Where the clips of a run are kept: that of a run which ended early and only had clips of this video, or a new
    one. Clips of a run that did not end early, or that are to be kept, stay what they are."""
    if earlier and earlier.is_all:
        before = read_settings(earlier.folder)
        if clips_in(earlier.folder) < before.get("clips", 0) and not before.get("keep_clips"):
            return earlier.folder
    return new_folder(clips_root())


IN_USE: weakref.WeakSet[StoredClips] = weakref.WeakSet()
"""Clips that ComfyUI has among its cached results: a node behind the sampler may read them."""


def make_room(gigabytes: int, current: Path) -> None:
    """Delete what earlier runs left behind beyond so many GB, oldest first, but nothing in use; 0 deletes nothing."""
    if gigabytes:
        delete_leftovers(clips_root(), gigabytes * 1e9, {current, *(clips.folder for clips in IN_USE)})


def let_go(clips: StoredClips) -> None:
    """The clips have become a file: their folder may go when ComfyUI no longer keeps them, unless it is to stay."""
    if not clips.settings["keep_clips"]:
        weakref.finalize(clips, shutil.rmtree, clips.folder, ignore_errors=True)


def check_prefix(prefix: str) -> None:
    """Raises ConfigError if a file name prefix leads out of ComfyUI's output folder or names no file."""
    root = os.path.abspath(folder_paths.get_output_directory())
    inside = os.path.abspath(os.path.join(root, prefix)).startswith(root + os.sep)
    if "\0" in prefix or not inside or not Path(prefix).name.strip(". "):
        raise ConfigError(
            f"filename_prefix={prefix!r} leads out of ComfyUI's output folder. Use a name such as video/talk."
        )


@contextlib.contextmanager
def new_output(prefix: str, suffix: str, width_px: int, height_px: int) -> Iterator[tuple[Path, str]]:
    """A new file in ComfyUI's output folder, taken before it is written so that no other server takes its name, and
    its subfolder. It is gone again if what writes it fails.

    Raises:
        ConfigError: if the prefix leads out of that folder, or to a place that cannot be written to.
    """
    check_prefix(prefix)
    root = folder_paths.get_output_directory()
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width_px, height_px)
        while True:
            path = Path(folder) / f"{name}_{counter:05}_{suffix}"
            try:
                path.touch(exist_ok=False)
                break
            except FileExistsError:
                counter += 1
    except OSError as error:
        raise ConfigError(
            f"filename_prefix={prefix!r} cannot be used ({error.strerror}). Use another name, or make room."
        ) from error
    try:
        yield path, subfolder
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def frame_reporter(frames: int) -> Callable[[int], None]:
    """Progress over the frames of a file; raises when the user has pressed cancel."""
    bar = comfy.utils.ProgressBar(frames)
    return lambda done: bar.update_absolute(done, frames)


def free_ram_bytes() -> int:
    return manager.get_free_memory(torch.device("cpu"))
