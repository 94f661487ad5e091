"""What ComfyUI offers, for the nodes: folders, progress, interrupt, its memory manager, and the loaded networks."""

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
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
from ..wan_s2v_core.config import ALWAYS, DEMO, AccelerationPlan, MemoryLimits, ModelRecipe, S2VModelConfig
from ..wan_s2v_core.errors import ConfigError, shown
from ..wan_s2v_core.io.clip_folders import delete_leftovers, delete_saved, new_folder, sweep_locks
from ..wan_s2v_core.io.clip_store import EarlierClips, StoredClips, clip_path, clips_in, keeps_clips, read_settings
from ..wan_s2v_core.io.locks import held, lock_of, sweep
from ..wan_s2v_core.io.outside import check_path, inside
from ..wan_s2v_core.io.video import SPARE_NAME_BYTES
from ..wan_s2v_core.memory.budget import WHOLE, Planned, Room, Sizes
from ..wan_s2v_core.memory.networks import load_placed, room_on, sizes_of, within_limit
from ..wan_s2v_core.memory.placement import Placement
from ..wan_s2v_core.model.checkpoint import DIT, LOW_NOISE_DIT, PART_LABELS, SPEECH_ENCODER, TEXT_ENCODER, VAE
from ..wan_s2v_core.model.loading import files_of
from ..wan_s2v_core.model.official import official_places
from ..wan_s2v_core.model.parts import Checkpoint
from ..wan_s2v_core.prepare import AUTO, plan_loading
from ..wan_s2v_core.runs import Run
from ..wan_s2v_core.sampling.clips import ClipTask
from ..wan_s2v_core.sampling.preview import colour_factors
from ..wan_s2v_core.warm_up import LIBRARIES, WarmUp, kernels
from .limits import SMALL_STATES, limits_in_prompt, reserved_bytes, started_limits
from .made import MADE

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
    """Folders at any depth of diffusion_models that hold a config.json, by their name in the menus: the path below the
    root, as ComfyUI names files. Where two roots have one of that name, the first root's counts."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(MODEL_FOLDERS[DIT])]
    near = [path.parent.name for root in roots if root.is_dir() for path in root.glob("*/config.json")]
    found = {}
    for name in official_places(listed(DIT), near):
        if folder := next((root / name for root in roots if (root / name / "config.json").is_file()), None):
            found[name + OFFICIAL] = folder
    return found


def listed(kind: str) -> list[str]:
    """ComfyUI's list of the files of a kind; Windows' backslashes become slashes, so that workflows travel."""
    return [name.replace(os.sep, "/") for name in folder_paths.get_filename_list(MODEL_FOLDERS[kind])]


def model_choices(kind: str) -> list[str]:
    """What a loader offers: official folders, files that are named after S2V, the embedded demo, other files."""
    folders = official_folders()
    inside = tuple(name.removesuffix(OFFICIAL) + "/" for name in folders)
    files = [name for name in listed(kind) if not (kind == DIT and name.startswith(inside))]
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


def input_path(name: str) -> Path | None:
    """Where ComfyUI's loaders look for a file by the name that they know it by, such as face.png or sub/face.png
    [output]; None where they refuse to: outside of its input, output and temp folders, and in newer versions also
    through a link out of them.
    """
    bare, root = folder_paths.annotated_filepath(str(name))
    path = inside(root or folder_paths.get_input_directory(), bare)
    try:
        if path:
            folder_paths.get_annotated_filepath(str(name))
    except ValueError:
        return None
    return path


def find_input(name: str) -> Path:
    """A file that ComfyUI's loaders will read.

    Raises:
        ConfigError: if it is not there, or `input_path` has none.
    """
    path = input_path(name)
    if path and os.path.isfile(path):
        return path
    bare, root = folder_paths.annotated_filepath(str(name))
    folder = Path(root or folder_paths.get_input_directory())
    found = inside(folder, bare)
    if path is None and found and os.path.isfile(found):
        raise ConfigError(
            f"'{shown(name)}' is a link out of ComfyUI's {folder.name} folder, which this ComfyUI does not follow. "
            "Copy the file itself there."
        )
    raise ConfigError(
        f"'{shown(name)}' is no file in ComfyUI's {folder.name} folder. Upload it there, press R and choose it again."
    )


def find_model(kind: str, name: Any) -> ModelRecipe:
    """The network behind a name in a menu; prompts of the API may hold anything there.

    Raises:
        ConfigError: if it is none of them.
    """
    if name == DEMO:
        return ModelRecipe(kind, str(embedded(CHECKPOINT)))
    folders, choices = official_folders(), model_choices(kind)
    if name not in (*folders, *choices):
        name = str(name).replace("\\", "/")  # as a workflow from Windows may have it
    if folder := folders.get(name):
        return ModelRecipe(kind, str(folder))
    path = folder_paths.get_full_path(MODEL_FOLDERS[kind], name) if name in choices else None
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(MODEL_FOLDERS[kind]))
        raise ConfigError(
            f"{shown(repr(name))} is not among the models in {MODEL_FOLDERS[kind]} (searched: {searched}). Put it "
            "there, press R in ComfyUI and choose it again."
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


check_interrupt = manager.throw_exception_if_processing_interrupted
"""Raises ComfyUI's own exception when the user has pressed cancel."""


def is_host(device: torch.device) -> bool:
    """Whether networks compute where they lie anyway."""
    return device == torch.device("cpu")


class WanS2VNetwork(nn.Module):
    """What ComfyUI's memory manager sees of a network of ours. Its weights move with their placement alone."""

    def __init__(self, placement: Placement):
        super().__init__()
        self.network, self.placement, self.device = placement.network, placement, torch.device("cpu")


class NetworkPatcher(comfy.model_patcher.ModelPatcher):
    """Lets ComfyUI take a network of ours off the GPU when it needs the room. A network is there as a whole or not at
    all; where only layers of one are to be there, they move by themselves (`memory.block_swap`)."""

    def __init__(self, placement: Placement, device: torch.device):
        super().__init__(WanS2VNetwork(placement), device, torch.device("cpu"), size=placement.bytes)
        self.placement = placement

    def loaded_size(self) -> int:
        return self.placement.device_bytes

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.placement.device_bytes else self.offload_device

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        try:
            self.placement.send(device_to, check=check_interrupt)
        except BaseException:
            self.placement.take_back()
            raise
        return self.loaded_size()

    def partially_unload(self, device_to, memory_to_free=0, *args, **options) -> int:
        freed = self.loaded_size()
        self.placement.take_back()
        return freed

    def detach(self, unpatch_all=True) -> WanS2VNetwork:
        self.placement.take_back()
        return self.model

    def get_ram_usage(self) -> int:
        return self.placement.host_bytes


WARMED: dict[str, WarmUp] = {}


def import_libraries() -> None:
    """Begin to import what networks are built with; once in a process."""
    if "libraries" not in WARMED:
        WARMED["libraries"] = WarmUp(LIBRARIES)


async def import_when_idle(_: Any) -> None:
    """Called when the server has started: until a prompt comes, there is time for what takes seconds."""
    import_libraries()


def warm_up() -> None:
    """Begin to make ready what a run needs besides weights; called when it begins."""
    import_libraries()
    if "kernels" not in WARMED:
        WARMED["kernels"] = WarmUp(kernels(manager.get_torch_device()))


def wait_until_warm(kind: str) -> None:
    """Until what a kind of network needs is ready, where that has begun."""
    for warmed in WARMED.values():
        warmed.wait(kind)


class Place:
    """Where the network of one file is kept."""

    def __init__(self):
        self.made_from: tuple | None = None
        self.patcher: NetworkPatcher | None = None
        self.sizes: tuple[tuple, Sizes] | None = None
        """What they were measured for, and they."""


PLACES: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
"""(kind, path) -> Place. A network lives as long as ComfyUI keeps the output of a loader that names it."""
PLACES_LOCK = threading.Lock()
"""A forecast asks for places in a thread of its own."""


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
        with PLACES_LOCK:
            self.place = PLACES.setdefault((recipe.kind, recipe.path), Place())

    @property
    def patcher(self) -> NetworkPatcher | None:
        """The network as ComfyUI manages it, once it has been loaded. ComfyUI's caches look for it by this name."""
        return self.place.patcher

    def get_ram_usage(self) -> int:
        """Bytes of host memory; asked for by ComfyUI 0.3.75."""
        return self.patcher.get_ram_usage() if self.patcher else 0

    def _comfy_cache_tensors(self) -> list[Tensor]:
        """What takes host memory; asked for by ComfyUI 0.38 and later."""
        return self.patcher.placement.host_tensors() if self.patcher else []

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
        offload: when networks leave the GPU, one of `config.OFFLOADS`.
        on_cpu: leave all of them in main memory.
        split_experts: into so many experts the feed-forwards of a dense DiT are split; 0 leaves them whole.
        low_noise: a second DiT, for steps of low noise.
        text_precision: of the text encoder, see `prepare.TEXT_PRECISIONS`.
        limits: what memory a run may use. None: what the DiT among the models says, or else the running prompt.
    """

    def __init__(
        self,
        *models: Model,
        precision: str = AUTO,
        offload: str = AUTO,
        on_cpu: bool = False,
        split_experts: int = 0,
        low_noise: Model | None = None,
        text_precision: str = AUTO,
        limits: MemoryLimits | None = None,
    ):
        self.models = {model.recipe.kind: model for model in models}
        if low_noise is not None:
            self.models[LOW_NOISE_DIT] = low_noise
        self.checkpoint = Checkpoint({name: model.recipe.path for name, model in self.models.items()})
        card = manager.get_torch_device()
        self.device = torch.device("cpu") if on_cpu else card
        self.acceleration = self.models[DIT].acceleration if DIT in self.models else AccelerationPlan()
        planned = plan_loading(precision, card, split_experts, self.acceleration, text_precision)
        self.loading = replace(planned, device=str(self.device))
        if limits is None:
            limits = self.models[DIT].limits if DIT in self.models else limits_in_prompt()
        self.limits = started_limits(limits)
        self.offload = ALWAYS if manager.vram_state in SMALL_STATES or manager.DISABLE_SMART_MEMORY else offload

    @contextlib.contextmanager
    def use(self, name: str, planned: Planned = WHOLE) -> Iterator[nn.Module]:
        swaps = planned.plan.swaps
        patcher = self._patcher(name, planned.plan.locks and swaps)
        placement, entry = patcher.placement, manager.LoadedModel(patcher)
        if swaps:
            patcher.detach()
        missing = planned.weight_bytes if swaps else patcher.model_size() - patcher.loaded_size()
        self._make_room(missing, planned.working_bytes, entry)
        with within_limit(self.device, self.limits, missing + planned.working_bytes):
            if swaps:
                try:
                    with placement.on(self.device, planned.plan, check_interrupt) as network:
                        yield network
                finally:
                    manager.soft_empty_cache()
                return
            self._bring(entry)
            try:
                yield placement.network
            finally:
                if self.offload != AUTO and placement.device_bytes:
                    patcher.detach()
                    manager.soft_empty_cache()

    def _bring(self, entry: manager.LoadedModel) -> None:
        """All of a network comes to the device, listed there with ComfyUI, which may take it off later on.

        `load_models_gpu` would also ask for pinned memory of the network's size, and take that from others.
        """
        if is_host(self.device):
            return
        listed = manager.current_loaded_models
        if entry in listed:
            entry = listed.pop(listed.index(entry))
        if entry.model.loaded_size() < entry.model.model_size():
            entry.model_load()
        listed.insert(0, entry)

    def _make_room(self, weight_bytes: int, working_bytes: int, keep: manager.LoadedModel) -> None:
        """Let ComfyUI take other networks off the device until so much is free, of what this run may use."""
        if is_host(self.device):
            return
        free = room_on(self.device, self.limits, 0, reserved_bytes()).device_bytes
        if free is None:  # a device whose memory ComfyUI alone can tell
            working_bytes = max(working_bytes + reserved_bytes(), manager.minimum_inference_memory())
        else:  # what ComfyUI counts as free, but is not for us
            working_bytes += manager.get_free_memory(self.device) - free
        manager.free_memory(weight_bytes + working_bytes, self.device, [keep])

    def room(self, name: str) -> Room:
        """What is free, and what ComfyUI can make free by taking other networks off the card."""
        loaded = [entry.model for entry in manager.current_loaded_models if entry.device == self.device]
        returnable = sum(patcher.loaded_size() for patcher in loaded if patcher is not None)
        return room_on(self.device, self.limits, returnable, reserved_bytes())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.models)

    def dit_config(self) -> S2VModelConfig:
        return self.checkpoint.config(DIT)

    def sizes(self, name: str) -> Sizes:
        model = self.models[name]
        wait_until_warm(model.recipe.kind)
        made_from = self._made_from(model.recipe)
        if model.place.sizes is None or model.place.sizes[0] != made_from:
            model.place.sizes = made_from, sizes_of(self.checkpoint.part(name), self.loading)
        return model.place.sizes[1]

    def recover(self) -> None:
        manager.unload_all_models()
        manager.soft_empty_cache()

    def _patcher(self, name: str, packs: bool) -> NetworkPatcher:
        """The network under ComfyUI's management, loaded unless it is there as it is wanted. `packs`: see
        `load_placed`."""
        recipe, place = self.models[name].recipe, self.models[name].place
        wait_until_warm(recipe.kind)
        if place.made_from != self._made_from(recipe):
            place.made_from = place.patcher = None  # two of one network would take twice the memory
            log.info("loading the %s of %s", PART_LABELS[recipe.kind], Path(recipe.path).name)
            placement = load_placed(self.checkpoint, name, self.loading, packs, check_interrupt)
            place.patcher = NetworkPatcher(placement, self.device)
            place.made_from = self._made_from(recipe)  # loading may have written a file of split experts
        return place.patcher

    def _made_from(self, recipe: ModelRecipe) -> tuple:
        """Changes when a network has to be loaded again."""
        return stamp_of(recipe), self.loading.concerning(recipe.kind, recipe.path)


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


def find_clips(run: Run) -> EarlierClips | None:
    """The longest beginning of a run's video in the output folder."""
    root = clips_root()
    return run.find_earlier(sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else [])


def clips_folder(earlier: EarlierClips | None, clips: int) -> Path:
    """Where the clips of a run are kept: that of a run which made the same video, or ended early and only had clips of
    this one; or a new one. Clips of another video, or that are to be kept, stay what they are.

    Args:
        clips: of the whole video.
    """
    if earlier and earlier.is_all:
        before = read_settings(earlier.folder)
        planned = before.get("clips")
        ended_early = isinstance(planned, int) and clips_in(earlier.folder) < planned
        if not keeps_clips(before) and (ended_early or earlier.clips == clips):
            return earlier.folder
    return new_folder(clips_root())


@contextlib.contextmanager
def clips_begun(run: Run) -> Iterator[None]:
    """Within, a run keeps its clips in a folder in which no other server works meanwhile, after those it begins with.

    Raises:
        ConfigError: if the output folder cannot be written to.
    """
    try:
        clips_root().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{shown(clips_root())} cannot be made ({error.strerror}). Make room, or move it.") from error
    earlier = find_clips(run)
    with contextlib.ExitStack() as stack:
        folder = clips_folder(earlier, run.job.clips)
        try:
            stack.enter_context(held(folder))
        except ConfigError:  # another server is at it
            folder = new_folder(clips_root())
            stack.enter_context(held(folder))
        if earlier and not clip_path(earlier.folder, earlier.clips - 1).is_file():  # it has just been deleted there
            earlier, folder = None, new_folder(clips_root())
            stack.enter_context(held(folder))
        run.begin(folder, earlier)
        yield


IN_USE: weakref.WeakSet[StoredClips] = weakref.WeakSet()
"""Clips that ComfyUI has among its cached results: a node behind the sampler may read them."""


def make_room(gigabytes: int, current: Path) -> None:
    """Delete what earlier runs left behind beyond so many GB, oldest first, but nothing in use; 0 deletes nothing."""
    sweep_locks(clips_root())
    if gigabytes:
        forget(delete_leftovers(clips_root(), gigabytes * 1e9, {current, *(clips.folder for clips in IN_USE)}))


def let_go(clips: StoredClips) -> None:
    """The clips have become a file. They stay until the next ones do, so that the same video in another format or under
    another name samples nothing; those of earlier videos go, but for what ComfyUI still has among its results."""
    clips.mark_saved()
    forget(delete_saved(clips_root(), {clips.folder, *(other.folder for other in IN_USE)}))


def forget(folders: list[Path]) -> None:
    """Folders of clips have been deleted."""
    for folder in folders:
        MADE.forget(folder)


@contextlib.contextmanager
def in_use(clips: StoredClips) -> Iterator[None]:
    """Within, no other server deletes the clips."""
    lock = lock_of(clips.folder)
    with contextlib.suppress(OSError):
        lock.acquire()  # where another one reads them too, it is as good
    try:
        yield
    finally:
        lock.release()


def check_prefix(prefix: str) -> None:
    """Raises ConfigError if a file name prefix leads out of ComfyUI's output folder, or is none for a file."""
    check_path("filename_prefix", prefix, SPARE_NAME_BYTES)
    path = inside(folder_paths.get_output_directory(), prefix)
    if path is None or not Path(prefix).name.strip(". "):
        raise ConfigError(
            f"filename_prefix='{shown(prefix)}' leads out of ComfyUI's output folder. Use a name such as video/talk."
        )
    if not is_followed(path.parent):
        raise ConfigError(
            f"filename_prefix='{shown(prefix)}' goes through a link out of ComfyUI's output folder, which this ComfyUI "
            "does not follow. Use another folder, or start ComfyUI with --output-directory."
        )


def is_followed(folder: Path) -> bool:
    """Whether ComfyUI saves into a folder that is inside its output folder by name: newer versions follow no links out
    of it."""
    within = getattr(folder_paths, "is_within_directory", None)
    return within is None or within(folder_paths.get_output_directory(), str(folder))


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
        for unfinished in sweep(Path(folder), rf"{re.escape(name)}_\d+_"):  # of servers that were killed
            remove_empty(Path(folder) / f"{unfinished}{suffix}")
        while True:
            path = Path(folder) / f"{name}_{counter:05}_{suffix}"
            try:
                path.touch(exist_ok=False)
                break
            except FileExistsError:
                counter += 1
    except OSError as error:
        raise ConfigError(
            f"filename_prefix={shown(prefix)!r} cannot be used ({error.strerror}). Use another name, or make room."
        ) from error
    try:
        yield path, subfolder
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def remove_empty(path: Path) -> None:
    """Remove the file that stood for one under way."""
    with contextlib.suppress(OSError):
        if not path.stat().st_size:
            path.unlink()


def frame_reporter(frames: int) -> Callable[[int], None]:
    """Progress over the frames of a file; raises when the user has pressed cancel."""
    bar = comfy.utils.ProgressBar(frames)
    return lambda done: bar.update_absolute(done, frames)


def free_ram_bytes() -> int:
    return manager.get_free_memory(torch.device("cpu"))
