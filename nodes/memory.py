"""How a run fits into a card: recipe in, recipe with other limits out."""

from comfy_api.latest import io

from ..wan_s2v_core.config import AUTO, WEIGHT_PLACES
from .bridge.networks import Model
from .limits import DECIDED, MEMORY_NODE, PROFILES, limits_of
from .sockets import S2VModel, check_link, found_by

CATEGORY = "WanS2V/memory"


class Memory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=MEMORY_NODE,
            display_name="Wan S2V Memory",
            category=CATEGORY,
            **found_by("block swap", "offload", "low VRAM", "out of memory", "显存"),
            description="How every stage of a run fits into a GPU, between the loader and Wan S2V Sample. Without this "
            "node, and as it comes, it is decided by what is free. Results are the same up to rounding, whatever is "
            "chosen here.",
            inputs=[
                S2VModel.Input("model"),
                io.Combo.Input(
                    "profile",
                    options=list(PROFILES),
                    default=AUTO,
                    tooltip="The card to plan for. auto measures what is free. Others plan as if the card were of that "
                    "size, such as to leave the rest to other programs. custom: vram_limit_gb.",
                ),
                io.Float.Input(
                    "vram_limit_gb",
                    default=8.0,
                    min=1.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Size of the card in GB of 1e9 bytes, for profile custom.",
                ),
                io.Int.Input(
                    "resident_blocks",
                    default=DECIDED,
                    min=DECIDED,
                    max=1000,
                    tooltip="Blocks of the model that stay on the card; the others wait in main memory and come while "
                    "others compute. -1: as many as fit. Known as block swap.",
                ),
                io.Int.Input(
                    "slice_tokens",
                    default=DECIDED,
                    min=DECIDED,
                    max=10_000_000,
                    step=128,
                    tooltip="Tokens that the model computes at once. Fewer take less memory and a little longer. "
                    "-1: decided by what is free. 0: all.",
                ),
                io.Int.Input(
                    "vae_tile",
                    default=DECIDED,
                    min=DECIDED,
                    max=8192,
                    step=8,
                    tooltip="Side in pixels of the tiles that the VAE works in; the picture has no seams. -1: decided "
                    "by what is free. 0: whole pictures. Multiples of 8.",
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHT_PLACES),
                    default=AUTO,
                    tooltip="Where weights wait that come and go. locked in main memory is fastest; mapped reads them "
                    "from their file and takes none of it. auto: by what is free there.",
                ),
            ],
            outputs=[S2VModel.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, profile, vram_limit_gb, resident_blocks, slice_tokens, vae_tile, weights) -> io.NodeOutput:
        check_link("model", model, Model)
        return io.NodeOutput(
            model.with_limits(limits_of(profile, vram_limit_gb, resident_blocks, slice_tokens, vae_tile, weights))
        )
