"""Finished clips become pictures and sound for other nodes, or a video file."""

import json

import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, io, ui

from ..wan_s2v_core.config import check_choice
from ..wan_s2v_core.errors import ConfigError
from ..wan_s2v_core.io.clip_store import StoredClips
from ..wan_s2v_core.io.film import write_film
from ..wan_s2v_core.io.video import DEFAULT_PRESET, video_preset, video_presets
from .bridge.clips import in_use, let_go
from .bridge.messages import frame_reporter, shown_in
from .bridge.networks import free_ram_bytes
from .bridge.outputs import check_prefix, new_output
from .made import MADE
from .sockets import S2VClips, audio_of, check_link, found_by

CATEGORY = "WanS2V/video"
BYTES_PER_VALUE = 4


class DecodeClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VDecode",
            display_name="Wan S2V Decode",
            category=CATEGORY,
            **found_by("VAE decode", "frames"),
            description="All frames and the sound for other nodes. Holds the whole video in main memory, so it is for "
            "short ones; Wan S2V Save Video writes any length.",
            inputs=[S2VClips.Input("clips")],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Audio.Output(display_name="audio"),
                io.Float.Output(display_name="fps"),
            ],
        )

    @classmethod
    def execute(cls, clips) -> io.NodeOutput:
        check_link("clips", clips, StoredClips)
        needed = BYTES_PER_VALUE * 3 * clips.frames * clips.width_px * clips.height_px
        if needed > (free := free_ram_bytes()):
            raise ConfigError(
                f"{clips.frames} frames of {clips.width_px}x{clips.height_px} px take {needed / 1e9:.1f} GB as images, "
                f"{free / 1e9:.1f} GB of main memory is free. Use Wan S2V Save Video, which writes clip after clip."
            )
        images = torch.empty(clips.frames, clips.height_px, clips.width_px, 3)
        position = 0
        with in_use(clips):
            for frames in clips:
                torch.div(frames, 255, out=images[position : position + len(frames)])
                position += len(frames)
        return io.NodeOutput(images, audio_of(clips.recording, clips.frames / clips.fps), float(clips.fps))


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VSaveVideo",
            display_name="Wan S2V Save Video",
            category=CATEGORY,
            **found_by("save mp4", "export video"),
            description="Writes clip after clip with the sound into one file in ComfyUI's output folder, holding one "
            "clip in memory. The file carries the workflow: drop it on the canvas.",
            inputs=[
                S2VClips.Input("clips"),
                io.String.Input(
                    "filename_prefix",
                    default="video/WanS2V",
                    tooltip="Folder and name inside ComfyUI's output folder. %year%, %month%, %day%, %hour%, %width% "
                    "and such work.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(video_presets()),
                    default=DEFAULT_PRESET,
                    tooltip="h264-mp4 plays everywhere; vp9-webm is smaller but slow; lossless-mkv keeps all.",
                ),
            ],
            outputs=[io.Video.Output(display_name="video")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        """Told before the long run that comes first; None where another node gives the name, or nobody does."""
        try:
            check_prefix(filename_prefix or "later")
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """Changes when a file that was made of these is gone: ComfyUI runs it again."""
        return MADE.losses(inputs)

    @classmethod
    def execute(cls, clips, filename_prefix, format) -> io.NodeOutput:
        check_link("clips", clips, StoredClips)
        check_choice("format", format, video_presets())
        suffix, size = video_preset(format).suffix, (clips.width_px, clips.height_px)
        output = new_output(filename_prefix, suffix, *size)
        with in_use(clips), output as (path, subfolder):
            write_film(path, clips, cls._metadata(), frame_reporter(clips.frames))
        let_go(clips)
        node = cls.hidden.unique_id
        MADE.note([node, shown_in(node)], [path], may_change=True)
        shown = ui.SavedResult(path.name, subfolder, io.FolderType.output)
        return io.NodeOutput(InputImpl.VideoFromFile(str(path)), ui=ui.PreviewVideo([shown]))

    @classmethod
    def _metadata(cls) -> dict[str, str] | None:
        """The prompt and the workflow, as ComfyUI stores them; None where the server was told to store nothing."""
        if args.disable_metadata:
            return None
        found = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        return {name: json.dumps(value) for name, value in found.items() if value is not None}
