"""The whole way in one node: it stands for the nodes of the other files, and has no logic of its own."""

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..wan_s2v_core.config import (
    DEFAULT_SIZE,
    DEMO,
    DEMO_SIZE,
    HD_PRESET,
    PRESETS,
    REFERENCE_PRESET,
    VIDEO_SIZES,
    check_choice,
    preset_lines,
)
from ..wan_s2v_core.errors import ConfigError
from ..wan_s2v_core.io.video import video_presets
from ..wan_s2v_core.model.checkpoint import DIT
from .bridge.folders import files_stamp, find_input, find_model, input_choices
from .bridge.outputs import check_prefix
from .decode import CATEGORY, SaveVideo
from .encode import Conditioning, EncodeAudio, EncodeText
from .load import DemoInputs, LoadCheckpoint
from .made import MADE
from .sample import Sample, SamplingPreset
from .sockets import found_by

AUTO = "auto"
HIGH_SHIFT_PIXELS = 1024 * 704
"""Areas from here on take the reference's settings for 720p."""
AS_LINK = {"rawLink": True}
"""ComfyUI hands over where a link comes from, not what comes through it, so that the parts can be linked to it."""


class TalkingVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VTalkingVideo",
            display_name="Wan S2V Talking Video",
            category=CATEGORY,
            **found_by(
                "speech to video",
                "audio to video",
                "lip sync",
                "talking head",
                "avatar",
                "Wan2.2-S2V-14B",
                "数字人",
                "对口型",
            ),
            description="A picture and a voice become a talking video, in one node. It runs the other Wan S2V nodes, "
            "so cancel, going on after it, and caching are theirs; use those to set more.",
            inputs=[
                *inputs_of(LoadCheckpoint, "checkpoint"),
                io.Combo.Input(
                    "picture",
                    options=input_choices("image"),
                    upload=io.UploadType.image,
                    tooltip="Who speaks: a file of ComfyUI's input folder. embedded demo is the portrait of the pack.",
                ),
                io.Combo.Input(
                    "voice",
                    options=input_choices("audio", "video"),
                    upload=io.UploadType.audio,
                    tooltip="The recording, or a video with sound: a file of ComfyUI's input folder. embedded demo is "
                    "the voice of the pack.",
                ),
                *inputs_of(EncodeText, "prompt"),
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *PRESETS],
                    default=AUTO,
                    tooltip=f"auto: what goes with the checkpoint and the size. {'; '.join(preset_lines())}",
                ),
                io.Combo.Input(
                    "size",
                    options=[AUTO, *VIDEO_SIZES],
                    default=AUTO,
                    tooltip="Bounds the area; the picture gives the shape. auto: 256x256 for the embedded demo, else "
                    "480p.",
                ),
                *inputs_of(Sample, "seed"),
                *inputs_of(SaveVideo, "format", "filename_prefix"),
                io.Image.Input("image", optional=True, tooltip="Instead of picture.", extra_dict=AS_LINK),
                io.Audio.Input("audio", optional=True, tooltip="Instead of voice.", extra_dict=AS_LINK),
            ],
            outputs=[io.Video.Output(display_name="video")],
            is_output_node=True,
            enable_expand=True,
        )

    @classmethod
    def validate_inputs(cls, picture=None, voice=None, filename_prefix=None, image=None, audio=None):
        """Told before anything runs; None where another node gives the value, or nobody does."""
        try:
            check_prefix(filename_prefix or "later")
            files_of(picture or DEMO, voice or DEMO, image, audio)
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, checkpoint, picture, voice, image=None, audio=None, **others):
        """The parts look at their files when they run, which they do when this has changed; and so it has when a video
        that was made of these is gone."""
        given = {"checkpoint": checkpoint, "picture": picture, "voice": voice, "image": image, "audio": audio}
        files = files_stamp(*files_of(picture, voice, image, audio))
        return f"{LoadCheckpoint.fingerprint_inputs(checkpoint)} {files} {MADE.losses(given | others)}"

    @classmethod
    def execute(
        cls, checkpoint, picture, voice, prompt, preset, size, seed, format, filename_prefix, image=None, audio=None,
    ) -> io.NodeOutput:  # fmt: skip
        preset, (width, height) = settled(checkpoint, preset, size)
        check_choice("format", format, video_presets())
        check_prefix(filename_prefix)
        find_model(DIT, checkpoint)
        files_of(picture, voice, image, audio)
        graph = GraphBuilder()
        loaded = add(graph, LoadCheckpoint, checkpoint=checkpoint)
        if not audio:
            audio = add(graph, DemoInputs)[0] if voice == DEMO else graph.node("LoadAudio", audio=voice).out(0)
        if not image:
            image = add(graph, DemoInputs)[1] if picture == DEMO else graph.node("LoadImage", image=picture).out(0)
        heard = add(graph, EncodeAudio, audio_encoder=loaded[2], audio=audio)
        texts = add(graph, EncodeText, text_encoder=loaded[1], prompt=prompt)
        given = {"voice": heard[0], "positive": texts[0], "negative": texts[1], "picture": image}
        job = add(graph, Conditioning, **given, width=width, height=height)
        steps, guidance, shift, solver = add(graph, SamplingPreset, preset=preset)
        chosen = {"steps": steps, "guidance_scale": guidance, "shift": shift, "solver": solver, "seed": seed}
        clips = add(graph, Sample, model=loaded[0], vae=loaded[3], conditioning=job[0], **chosen)
        saved = add(graph, SaveVideo, clips=clips[0], filename_prefix=filename_prefix, format=format)
        return io.NodeOutput(saved[0], expand=graph.finalize())


def inputs_of(node: type[io.ComfyNode], *names: str) -> list[io.Input]:
    """Inputs of one of our nodes, to offer the same here."""
    found = {entry.id: entry for entry in node.define_schema().inputs}
    return [found[name] for name in names]


def add(graph: GraphBuilder, node: type[io.ComfyNode], **inputs) -> list[list]:
    """Put one of our nodes into a graph, once, with the defaults of its own schema -> its outputs."""
    schema = node.define_schema()
    defaults = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None}
    made = graph.node(schema.node_id, id=schema.node_id, **(defaults | inputs))
    return [made.out(number) for number in range(len(schema.outputs))]


def settled(checkpoint: str, preset: str, size: str) -> tuple[str, tuple[int, int]]:
    """Preset and size, where auto means what goes with the checkpoint.

    Raises:
        ConfigError: if there is none of that name.
    """
    is_demo = checkpoint == DEMO
    if size == AUTO:
        size = DEMO_SIZE if is_demo else DEFAULT_SIZE
    check_choice("size", size, VIDEO_SIZES)
    width, height = VIDEO_SIZES[size]
    if preset == AUTO:
        fitting = REFERENCE_PRESET if width * height < HIGH_SHIFT_PIXELS else HD_PRESET
        preset = DEMO if is_demo else fitting
    check_choice("preset", preset, PRESETS)
    return preset, (width, height)


def files_of(picture: str, voice: str, image, audio) -> list:
    """The files that are read: those chosen, but for what is linked or comes with the pack.

    Raises:
        ConfigError: if one is not in ComfyUI's folders.
    """
    chosen = [name for name, link in ((picture, image), (voice, audio)) if not link and name != DEMO]
    return [find_input(name) for name in chosen]
