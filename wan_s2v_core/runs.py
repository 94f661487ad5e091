"""One run: the clips of a video, made with some networks after those that an earlier run left, and kept on the disk.

The command line and the nodes call this; what is theirs is where the clips lie, and how people are told of progress.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from .acceleration.experts.router import describe_experts
from .attach import NO_ROUTING
from .conditioning.bundle import S2VConditioning
from .conditioning.image import to_frames
from .conditioning.keys import ClipKeys
from .config import ExpertRouting, SamplingConfig
from .io.clip_store import ClipStore, EarlierClips, StoredClips, find_earlier
from .model.parts import Checkpoint, check_fit
from .networks import RunNetworks
from .pipeline import S2VPipeline
from .prepare import LoadPlan, choose_routing, picture_facts
from .sampling.clips import ClipTask

OnClipStep = Callable[[ClipTask, int, Tensor], None]
"""Called with the clip's task, the step from 1 and the clean latents that it predicts; may raise to stop."""


class Run:
    """A run whose settings are known to fit its networks, of which none is loaded yet.

    `accept` says what it is to make, `begin` where the clips are kept; then `clips` makes them.

    Args:
        networks: where its stages have theirs from.
        routing: how experts are used; a dense model has none and says so.
        keep_clips: whether the clips are to stay on the disk when they have become a video.
        request: what else the settings tell people, as JSON without folders of this machine.
        check: called before every layer of every network; may raise to stop.
    Raises:
        ConfigError, BackendUnavailable: if a setting cannot be used with these networks, or here.
    """

    def __init__(
        self,
        networks: RunNetworks,
        sampling: SamplingConfig,
        routing: ExpertRouting = NO_ROUTING,
        keep_clips: bool = False,
        request: dict[str, Any] | None = None,
        check: Callable[[], None] | None = None,
    ):
        self.networks, self.sampling, self.config = networks, sampling, networks.dit_config()
        networks.checkpoint.check_pair()
        self.attention = networks.loading.attention(self.config)
        self.asked_routing, self.keep_clips, self.request = routing, keep_clips, request or {}
        self.routing = choose_routing(self.config, routing)
        """None for a dense model."""
        self.pipeline = S2VPipeline(networks, check)
        self.job: S2VConditioning | None = None
        self.keys: ClipKeys | None = None
        self.store: ClipStore | None = None

    def accept(self, job: S2VConditioning) -> None:
        """This is to be seen and heard.

        Raises:
            CheckpointError: if the DiT reads other embeddings.
        """
        check_fit(self.config, job.text.shape[-1], job.features.shape[2], job.features.shape[0])
        self.job, networks = job.with_held_pose(), self.networks
        self.keys = clip_keys(self.job, self.sampling, self.routing, networks.checkpoint, networks.loading)

    @property
    def settings(self) -> dict[str, Any]:
        """How its clips are made, as JSON: kept with them, and told in the video. Files by their names alone."""
        return {
            "request": self.request,
            "networks": {name: path.absolute().name for name, path in self.networks.checkpoint.paths.items()},
            "loading": self.networks.loading.to_dict(),
            "limits": self.networks.limits.to_dict(),
            "video": self.job.video.to_dict(),
            "sampling": self.sampling.to_dict(),
            "routing": self.asked_routing.to_dict(),
            "keep_clips": self.keep_clips,
            "clips": self.job.clips,
        }

    def find_earlier(self, folders: Iterable[Path]) -> EarlierClips | None:
        """The longest beginning of this video that an earlier run left in one of these folders."""
        return find_earlier(folders, self.keys, self.keys.size)

    def begin(self, folder: Path, earlier: EarlierClips | None = None) -> None:
        """Keep the clips in a folder, after those of an earlier run.

        Raises:
            ConfigError: if the folder holds what is not ours, or a finished clip of another video.
        """
        self.store = ClipStore(folder, self.job.video.fps, self.job.recording, self.settings, self.keys, earlier)

    @property
    def stored(self) -> StoredClips:
        """The clips that are finished."""
        assert self.store is not None, "begin() it first"
        return self.store.stored

    def clips(self, on_step: OnClipStep | None = None) -> Iterator[Tensor]:
        """Make the clips that are missing -> the frames of each, T H W 3 uint8, when it is on the disk.

        Raises:
            CheckpointError: if a network gives what cannot be filmed.
            ConfigError: if the disk does not take a clip.
            OutOfMemory: if there is no room for a stage.
        """
        for clip in self.pipeline.generate(self.job, self.sampling, on_step, self.routing, self.stored):
            self.store.add(frames := to_frames(clip.video[0]), clip.latents, clip.motion_video)
            del clip  # the next one needs the room
            yield frames

    @property
    def expert_report(self) -> str | None:
        """What the experts did, or why settings of experts did nothing; None where nobody asked for any."""
        if self.routing:
            return f"experts, share of the tokens:\n{self.pipeline.expert_load}"
        return None if self.asked_routing == NO_ROUTING else describe_experts(self.config)


def clip_keys(
    job: S2VConditioning,
    config: SamplingConfig,
    routing: ExpertRouting | None,
    checkpoint: Checkpoint,
    loading: LoadPlan,
) -> ClipKeys:
    """The keys of the clips that `generate` makes of this with networks of a checkpoint."""
    facts = {
        "networks": picture_facts(checkpoint, loading),
        "sampling": config.to_dict(),
        "routing": routing and routing.to_dict(),
    }
    return ClipKeys(job, facts)
