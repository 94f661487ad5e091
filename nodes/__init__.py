"""The nodes, in the order in which they stand in the menu. The only code that knows ComfyUI."""

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .accelerate import Speed
from .bridge.warm_up import import_when_idle
from .decode import DecodeClips, SaveVideo
from .encode import Conditioning, EncodeAudio, EncodeText, VoiceFromEncoder
from .experts import Experts, ModelPair
from .forecast import add_route as add_memory_route
from .load import DemoInputs, LoadAudioEncoder, LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVAE
from .memory import Memory
from .sample import Noise, Sample, SamplingPreset
from .timeline import add_route
from .video import TalkingVideo

NODES = [
    TalkingVideo,
    LoadCheckpoint,
    LoadModel,
    LoadTextEncoder,
    LoadAudioEncoder,
    LoadVAE,
    DemoInputs,
    Speed,
    Memory,
    ModelPair,
    Experts,
    EncodeAudio,
    VoiceFromEncoder,
    EncodeText,
    Conditioning,
    SamplingPreset,
    Noise,
    Sample,
    DecodeClips,
    SaveVideo,
]


class WanS2VExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    add_route()
    add_memory_route()
    PromptServer.instance.app.on_startup.append(import_when_idle)
    return WanS2VExtension()
