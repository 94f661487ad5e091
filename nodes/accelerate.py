"""How a model is made faster: recipe in, recipe with a changed plan out."""

from comfy_api.latest import io

from ..wan_s2v_core.acceleration.attention.registry import AUTO_8, BACKENDS, CHOICES
from ..wan_s2v_core.config import AUTO, SPARSE_CHOICES, VAE_WAYS, AccelerationPlan, check_choice
from .bridge.networks import Model
from .sockets import S2VModel, check_link, found_by

CATEGORY = "WanS2V/speed"
USUAL = AccelerationPlan()


def attention_lines() -> list[str]:
    """The choices of attention as a person reads them, one a line."""
    return [
        f"{AUTO}: the fastest exact one that works here",
        f"{AUTO_8}: the fastest in 8 bits that works here, or else an exact one",
        *(f"{name} ({'exact' if one.is_exact else 'lossy'}): {one.what}" for name, one in BACKENDS.items()),
    ]


class Speed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VSpeed",
            display_name="Wan S2V Speed",
            category=CATEGORY,
            **found_by(
                "attention backend", "SageAttention", "sparse attention", "torch compile", "feature cache", "加速"
            ),
            description="How the model and the VAE are made faster, between the loader and Wan S2V Sample. As it "
            "comes it is what runs without this node: the same up to rounding. What is lossy says so. It shows which "
            "attention ran.",
            inputs=[
                S2VModel.Input("model"),
                io.Combo.Input(
                    "attention", options=list(CHOICES), default=USUAL.attention, tooltip="; ".join(attention_lines())
                ),
                io.Float.Input(
                    "sparse_keep",
                    default=USUAL.sparse_keep,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the attention that is computed. 1 is all of it; below it is lossy. flash4 and "
                    "sage cannot do it.",
                ),
                io.Combo.Input(
                    "sparse_by",
                    options=list(SPARSE_CHOICES),
                    default=USUAL.sparse_by,
                    tooltip="Which share is computed. scores: what queries and keys have most to do with, chosen anew "
                    "in every forward. distance: what is near in picture and time.",
                ),
                io.Int.Input(
                    "sparse_dense_steps",
                    default=USUAL.sparse_dense_steps,
                    min=0,
                    max=1000,
                    tooltip="Steps at the start of a clip that compute all of it: they decide what is where.",
                ),
                io.Int.Input(
                    "sparse_dense_blocks",
                    default=USUAL.sparse_dense_blocks,
                    min=0,
                    max=1000,
                    tooltip="Blocks at the start of the model that compute all of it.",
                ),
                io.Boolean.Input(
                    "fused",
                    default=USUAL.fused,
                    tooltip="One kernel for each step between the products, on an NVIDIA card with Triton. Exact; off "
                    "to compare.",
                ),
                io.Combo.Input(
                    "vae",
                    options=list(VAE_WAYS),
                    default=USUAL.vae,
                    tooltip="auto: bfloat16 on a card, unless precision is float32, and float32 on a CPU. float32: as "
                    "the reference. bfloat16 is faster, takes less memory, and is 59 to 62 dB from float32.",
                ),
            ],
            outputs=[S2VModel.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, attention, sparse_keep, sparse_by, sparse_dense_steps, sparse_dense_blocks, fused, vae
    ) -> io.NodeOutput:
        check_link("model", model, Model)
        check_choice("attention", attention, CHOICES)
        plan = AccelerationPlan(
            attention=attention,
            sparse_keep=sparse_keep,
            sparse_by=sparse_by,
            sparse_dense_steps=sparse_dense_steps,
            sparse_dense_blocks=sparse_dense_blocks,
            fused=fused,
            vae=vae,
        )
        return io.NodeOutput(model.with_acceleration(plan, cls.hidden.unique_id))
