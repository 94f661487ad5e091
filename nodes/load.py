"""Where networks come from. A loader only names a file; it is read when a stage needs it."""

from comfy_api.latest import io

from ..wan_s2v_core.assets import PORTRAIT, VOICE, embedded
from ..wan_s2v_core.conditioning.image import read_picture
from ..wan_s2v_core.io.audio import read_recording
from ..wan_s2v_core.model.checkpoint import DIT, SPEECH_ENCODER, TEXT_ENCODER, VAE
from .bridge.folders import MODEL_FOLDERS, checkpoint_choices, find_model, model_choices, stamp_of
from .bridge.networks import Model
from .bridge.warm_up import warm_up
from .sockets import S2VAudioEncoder, S2VModel, S2VTextEncoder, S2VVae, audio_of, found_by

CATEGORY = "WanS2V/loaders"


class LoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VLoadCheckpoint",
            display_name="Wan S2V Load Checkpoint",
            category=CATEGORY,
            **found_by("Wan2.2-S2V-14B", "checkpoint loader"),
            description="All four networks from one folder in the official layout of Wan2.2-S2V-14B, or the embedded "
            "demo. An official folder is any folder in models/diffusion_models, at any depth, that holds config.json.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoint_choices(),
                    tooltip="Official folders in models/diffusion_models, and the tiny demo that comes with the pack.",
                )
            ],
            outputs=[
                S2VModel.Output("model", display_name="model"),
                S2VTextEncoder.Output("text_encoder", display_name="text encoder"),
                S2VAudioEncoder.Output("audio_encoder", display_name="audio encoder"),
                S2VVae.Output("vae", display_name="vae"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint):
        return stamp_of(*(find_model(kind, checkpoint) for kind in MODEL_FOLDERS))

    @classmethod
    def execute(cls, checkpoint) -> io.NodeOutput:
        warm_up()
        return io.NodeOutput(*(Model(find_model(kind, checkpoint)) for kind in MODEL_FOLDERS))


class LoadOne(io.ComfyNode):
    """What the four single loaders share; they differ in data alone."""

    KIND: str
    SOCKET: type
    NODE_ID: str
    NAME: str
    WHAT: str

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = MODEL_FOLDERS[cls.KIND]
        return io.Schema(
            node_id=cls.NODE_ID,
            display_name=f"Wan S2V Load {cls.NAME}",
            category=CATEGORY,
            description=f"{cls.WHAT} from models/{folder}, from an official folder, or the embedded demo's. What a "
            "file is, is told from its tensors; a wrong one is named.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=model_choices(cls.KIND),
                    tooltip=f"Files in models/{folder}; R refreshes.",
                )
            ],
            outputs=[cls.SOCKET.Output(display_name=cls.NAME.lower())],
        )

    @classmethod
    def fingerprint_inputs(cls, name):
        return stamp_of(find_model(cls.KIND, name))

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        warm_up()
        return io.NodeOutput(Model(find_model(cls.KIND, name)))


class LoadModel(LoadOne):
    KIND, SOCKET, NODE_ID, NAME = DIT, S2VModel, "WanS2VLoadModel", "Model"
    WHAT = "The S2V DiT in bf16, fp16, fp32 or fp8"


class LoadTextEncoder(LoadOne):
    KIND, SOCKET, NODE_ID, NAME = TEXT_ENCODER, S2VTextEncoder, "WanS2VLoadTextEncoder", "Text Encoder"
    WHAT = "umT5-xxl with its tokenizer"


class LoadAudioEncoder(LoadOne):
    KIND, SOCKET, NODE_ID, NAME = SPEECH_ENCODER, S2VAudioEncoder, "WanS2VLoadAudioEncoder", "Audio Encoder"
    WHAT = "wav2vec 2.0 large (XLSR-53 English)"


class LoadVAE(LoadOne):
    KIND, SOCKET, NODE_ID, NAME = VAE, S2VVae, "WanS2VLoadVAE", "VAE"
    WHAT = "The Wan 2.1 video VAE"


class DemoInputs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VDemoInputs",
            display_name="Wan S2V Demo Voice and Picture",
            category=CATEGORY,
            description="The drawn portrait and the synthetic voice that come with the pack, to try a workflow with.",
            inputs=[],
            outputs=[io.Audio.Output("audio", display_name="audio"), io.Image.Output("image", display_name="image")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        recording, picture = read_recording(embedded(VOICE)), read_picture(embedded(PORTRAIT))
        return io.NodeOutput(audio_of(recording, recording.seconds), picture[None].float() / 255)
