"""Both meanings of experts, between a loader and the sampler: inside of the feed-forwards, and two models as a pair."""

from comfy_api.latest import io

from ..wan_s2v_core.config import NOISE_BOUNDARY, OVERFLOWS, ExpertRouting, SamplingConfig, check_choice
from .bridge.networks import Model
from .sockets import S2VModel, check_link, found_by

CATEGORY = "WanS2V/sampling"


class Experts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VExperts",
            display_name="Wan S2V Experts",
            category=CATEGORY,
            **found_by("MoE", "mixture of experts", "moe_top_k", "moe_gate_dropout", "moe_overflow", "专家"),
            description="How tokens are shared out among the experts of a model that has them, between the loader and "
            "Wan S2V Sample, which has moe_expert_capacity. S2V-14B is dense and has no experts: there it does "
            "nothing, and the sampler says so.",
            inputs=[
                S2VModel.Input("model"),
                io.Int.Input(
                    "moe_top_k",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Experts per token. 0: as the checkpoint says. Fewer is an approximation.",
                ),
                io.Float.Input(
                    "moe_gate_dropout",
                    default=ExpertRouting.gate_dropout,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="Probability of masking an expert choice, by the sampler's seed. Lowers fidelity.",
                ),
                io.Combo.Input(
                    "moe_overflow",
                    options=list(OVERFLOWS),
                    default=ExpertRouting.overflow,
                    tooltip="Tokens beyond an expert's capacity: spill takes them in further rounds, with the same "
                    "result; drop leaves that expert out for them, and needs moe_expert_capacity.",
                ),
            ],
            outputs=[S2VModel.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, moe_top_k, moe_gate_dropout, moe_overflow) -> io.NodeOutput:
        check_link("model", model, Model)
        check_choice("moe_overflow", moe_overflow, OVERFLOWS)
        said = ExpertRouting(top_k=moe_top_k or None, gate_dropout=moe_gate_dropout)
        return io.NodeOutput(
            model.with_details(top_k=said.top_k, gate_dropout=said.gate_dropout, overflow=moe_overflow)
        )


class ModelPair(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VModelPair",
            display_name="Wan S2V Model Pair",
            category=CATEGORY,
            **found_by("high noise", "low noise", "two models", "noise boundary", "MoE", "双模型"),
            description="Two S2V models that were trained as a pair, one for high noise and one for low, as one model "
            "for Wan S2V Sample. S2V-14B is one model and needs none.",
            inputs=[
                S2VModel.Input("model", tooltip="Serves the steps of high noise, and says what goes for both."),
                S2VModel.Input("low_noise_model", tooltip="Serves the steps of low noise; built like the first."),
                io.Float.Input(
                    "noise_boundary",
                    default=NOISE_BOUNDARY,
                    min=0.005,
                    max=0.995,
                    step=0.005,
                    tooltip="Noise level (sigma, 1 to 0) at which low_noise_model takes over: model serves from there "
                    "up.",
                ),
            ],
            outputs=[S2VModel.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, low_noise_model, noise_boundary) -> io.NodeOutput:
        check_link("model", model, Model)
        check_link("low_noise_model", low_noise_model, Model)
        SamplingConfig(noise_boundary=noise_boundary)  # says what is wrong with it
        return io.NodeOutput(model.with_low_noise(low_noise_model, noise_boundary))
