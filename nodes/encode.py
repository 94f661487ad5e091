"""Voice, prompt, picture and driving video become what the sampler works from."""

from dataclasses import replace

from comfy_api.latest import io

from ..wan_s2v_core.conditioning.bundle import Voice, make_conditioning
from ..wan_s2v_core.config import CLIP_PLANS, DEFAULT_NEGATIVE_PROMPT, PICTURE_FITS, TIMINGS, VideoConfig, check_choice
from ..wan_s2v_core.io.audio import LARGEST_GAIN_DB, as_voice
from ..wan_s2v_core.io.foreign import AUDIO, recording_of
from ..wan_s2v_core.pipeline import S2VPipeline
from ..wan_s2v_core.prepare import AUTO, TEXT_PRECISIONS
from .bridge.folders import temp_folder
from .bridge.messages import TIMELINE, say, tell
from .bridge.networks import ComfyNetworks, Model, check_interrupt
from .sockets import (
    S2VAudioEncoder,
    S2VConditioningSocket,
    S2VTextEncoder,
    S2VVoice,
    check_link,
    found_by,
    picture_of,
    pose_of,
    text_of,
    voice_of,
)
from .timeline import timeline_of

CATEGORY = "WanS2V/conditioning"
BY_PICTURE, EXACT = SIZE_RULES = ("picture's aspect", "exact")
CARD, MEMORY = TEXT_DEVICES = ("default", "cpu")


class EncodeAudio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VEncodeAudio",
            display_name="Wan S2V Encode Audio",
            category=CATEGORY,
            **found_by("audio encoder", "wav2vec", "speech encoder"),
            description="What the audio encoder hears in a recording. Any rate, channel count and length.",
            inputs=[
                S2VAudioEncoder.Input("audio_encoder"),
                io.Audio.Input("audio", tooltip="The voice or song. It is also the sound of the video."),
                io.Float.Input(
                    "start_seconds",
                    default=0.0,
                    min=0.0,
                    max=86400.0,
                    step=0.1,
                    tooltip="Leave out this much of the recording at its start.",
                ),
                io.Float.Input(
                    "seconds",
                    default=0.0,
                    min=0.0,
                    max=86400.0,
                    step=0.1,
                    tooltip="Use this much of it. 0 goes on to its end.",
                ),
                io.Float.Input(
                    "gain_db",
                    default=0.0,
                    min=-LARGEST_GAIN_DB,
                    max=LARGEST_GAIN_DB,
                    step=0.5,
                    tooltip="Louder, or softer below 0: the sound of the video alone. The audio encoder evens out a "
                    "constant gain by itself, so lips do not depend on it.",
                ),
                io.Boolean.Input(
                    "normalize",
                    default=False,
                    tooltip="Before gain_db: one constant gain to an RMS level of -20 dBFS, less where peaks would "
                    "exceed -1 dBFS. Plain RMS, pauses included, not LUFS.",
                ),
            ],
            outputs=[S2VVoice.Output(display_name="voice")],
        )

    @classmethod
    def execute(cls, audio_encoder, audio, start_seconds, seconds, gain_db, normalize) -> io.NodeOutput:
        check_link("audio_encoder", audio_encoder, Model)
        recording = as_voice(recording_of(audio).cut(start_seconds, seconds or None), AUDIO)
        if normalize:
            recording = recording.levelled()
        heard = recording.amplified(gain_db)  # by those who watch the video
        pipeline = S2VPipeline(ComfyNetworks(audio_encoder), check_interrupt)
        voice = pipeline.encode_voice(recording, folder=temp_folder())
        return io.NodeOutput(replace(voice, recording=heard))


class VoiceFromEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VVoiceFromEncoder",
            display_name="Wan S2V Voice from Audio Encoder",
            category=CATEGORY,
            description="Takes what ComfyUI's own AudioEncoderEncode heard instead of Wan S2V Encode Audio. The "
            "encoder must be the model's, wav2vec 2.0 large (XLSR-53 English).",
            inputs=[
                io.AudioEncoderOutput.Input("audio_encoder_output", tooltip="Of AudioEncoderEncode, for this audio."),
                io.Audio.Input("audio", tooltip="The same recording. It is the sound of the video."),
            ],
            outputs=[S2VVoice.Output(display_name="voice")],
        )

    @classmethod
    def execute(cls, audio_encoder_output, audio) -> io.NodeOutput:
        return io.NodeOutput(voice_of(audio_encoder_output, as_voice(recording_of(audio), AUDIO)))


class EncodeText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VEncodeText",
            display_name="Wan S2V Encode Text",
            category=CATEGORY,
            **found_by("prompt", "text encoder", "umT5", "CLIP text encode"),
            description="Prompt and negative prompt as umT5 embeddings. ComfyUI's CLIP Text Encode with umT5 does too.",
            inputs=[
                S2VTextEncoder.Input("text_encoder"),
                io.String.Input(
                    "prompt",
                    default="A person talks to the camera.",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What is to be seen. Short and plain works: who, where, what they do.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default=DEFAULT_NEGATIVE_PROMPT,
                    multiline=True,
                    tooltip="What is not to be seen. The default is the one the model was tuned with; it has no effect "
                    "at guidance 1.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(TEXT_DEVICES),
                    default=CARD,
                    tooltip="cpu leaves the 11 GB text encoder in main memory: slow, but takes no room on the card.",
                ),
                io.Combo.Input(
                    "text_precision",
                    optional=True,  # prompts of the API that were made before it was there stay valid
                    options=list(TEXT_PRECISIONS),
                    default=AUTO,
                    tooltip="float8-weights: 7.8 instead of 11.4 GB, lossy. auto: bfloat16, and float32 on a CPU.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
        )

    @classmethod
    def execute(cls, text_encoder, prompt, negative_prompt, device, text_precision=AUTO) -> io.NodeOutput:
        check_link("text_encoder", text_encoder, Model)
        check_choice("device", device, TEXT_DEVICES)
        networks = ComfyNetworks(text_encoder, on_cpu=device == MEMORY, text_precision=text_precision)
        texts = S2VPipeline(networks, check_interrupt).encode_prompts(prompt, negative_prompt)
        return io.NodeOutput(*([[embeddings, {}]] for embeddings in texts))


class Conditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VConditioning",
            display_name="Wan S2V Conditioning",
            category=CATEGORY,
            **found_by("WanSoundImageToVideo", "pose video", "driving video", "reference image"),
            description="Brings voice, prompt, picture and driving video to one size and clock, and plans as many "
            "clips as the sound needs.",
            inputs=[
                S2VVoice.Input("voice"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Image.Input("picture", tooltip="Who speaks. The first picture of a batch is used."),
                io.Video.Input(
                    "pose_video",
                    optional=True,
                    tooltip="Driving video: poses for the same seconds of the sound. Black where it has ended, as in "
                    "the reference.",
                ),
                io.Int.Input(
                    "width",
                    default=832,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip="With height the size of the video, or its area: see size_rule.",
                ),
                io.Int.Input("height", default=480, min=64, max=4096, step=16, tooltip="Sides are multiples of 16."),
                io.Combo.Input(
                    "size_rule",
                    options=list(SIZE_RULES),
                    default=BY_PICTURE,
                    tooltip="picture's aspect: width x height bounds the area, the picture gives the shape, as in the "
                    "reference. exact: just this size.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(PICTURE_FITS),
                    default="crop",
                    tooltip="crop fills the frame; pad shows the whole picture between black bars; reference is as in "
                    "the original code.",
                ),
                io.Boolean.Input(
                    "start_from_picture",
                    default=False,
                    tooltip="The video begins as the picture and goes on from it.",
                ),
                io.Int.Input(
                    "max_clips", default=0, min=0, max=10000, tooltip="Stop after so many clips. 0: all of the sound."
                ),
                io.Float.Input(
                    "fps", default=16.0, min=1.0, max=60.0, step=0.01, tooltip="The model was trained for 16."
                ),
                io.Int.Input(
                    "clip_frames",
                    default=80,
                    min=20,
                    max=400,
                    step=4,
                    tooltip="Frames that a clip makes. The model was trained for 80; fewer need less memory.",
                ),
                io.Combo.Input(
                    "timing",
                    options=list(TIMINGS),
                    default="aligned",
                    tooltip="aligned: picture and sound start together. reference: pictures 3 frames ahead of it.",
                ),
                io.Combo.Input(
                    "clip_plan",
                    options=list(CLIP_PLANS),
                    default="audio",
                    tooltip="audio: the video is as long as the sound. reference: whole clips, the end in silence.",
                ),
                io.Boolean.Input(
                    "hear_past",
                    default=False,
                    tooltip="A clip hears what was said before it. The reference holds the clip's first moment.",
                ),
            ],
            outputs=[S2VConditioningSocket.Output(display_name="conditioning")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, voice, positive, negative, picture, width, height, size_rule, fit, start_from_picture, max_clips, fps,
        clip_frames, timing, clip_plan, hear_past, pose_video=None,
    ) -> io.NodeOutput:  # fmt: skip
        check_link("voice", voice, Voice)
        check_choice("size_rule", size_rule, SIZE_RULES)
        video = VideoConfig(
            max_area=width * height,
            fps=fps,
            clip_frames=clip_frames,
            fit=fit,
            timing=timing,
            clip_plan=clip_plan,
            starts_from_reference=start_from_picture,
            clips=max_clips or None,
            exact_size=(height, width) if size_rule == EXACT else None,
            hears_past=hear_past,
        )
        texts = text_of(positive, "positive"), text_of(negative, "negative")
        pose = None if pose_video is None else pose_of(pose_video, fps)
        made = make_conditioning(picture_of(picture), voice, *texts, video, pose)
        rows, columns = made.size_px
        seconds = made.plan.frames / fps
        say(
            cls.hidden.unique_id,
            f"{made.plan.frames} frames, {seconds:.1f} s, {columns}x{rows} px, {made.clips} clips",
        )
        tell(TIMELINE, cls.hidden.unique_id, plan=timeline_of(made))
        return io.NodeOutput(made)
