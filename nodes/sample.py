"""All clips of a video, each carrying its motion into the next."""

from comfy_api.latest import io

from ..wan_s2v_core.attach import attention_line
from ..wan_s2v_core.conditioning.bundle import S2VConditioning
from ..wan_s2v_core.config import (
    LARGEST_SEED,
    NOISES,
    OFFLOADS,
    PRESETS,
    REFERENCE_PRESET,
    SOLVERS,
    SPACINGS,
    ExpertRouting,
    SamplingConfig,
    check_choice,
    preset_lines,
    sampling_preset,
)
from ..wan_s2v_core.prepare import AUTO, PRECISIONS, warn_of_cpu
from ..wan_s2v_core.runs import Run
from .bridge.clips import CLIPS_FOLDER, IN_USE, clips_begun, make_room
from .bridge.messages import say, step_reporter
from .bridge.networks import ComfyNetworks, Model, check_interrupt
from .clip_films import ClipFilms
from .made import MADE
from .sockets import S2VClips, S2VConditioningSocket, S2VModel, S2VVae, check_link, found_by, latent_of

CATEGORY = "WanS2V/sampling"
AnyChoice = io.Custom("COMBO")
"""A Combo output of ComfyUI's would have the list of its options as its type, and fit no Combo input."""


class SamplingPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VSamplingPreset",
            display_name="Wan S2V Sampling Preset",
            category=CATEGORY,
            description="Steps, guidance, shift and solver that go together. Connect them to the inputs of Wan S2V "
            "Sample that have the same names; what is not connected stays as it is set there.",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=REFERENCE_PRESET,
                    tooltip="; ".join(preset_lines()),
                )
            ],
            outputs=[
                io.Int.Output("steps", display_name="steps"),
                io.Float.Output("guidance_scale", display_name="guidance_scale"),
                io.Float.Output("shift", display_name="shift"),
                AnyChoice.Output("solver", display_name="solver"),
            ],
        )

    @classmethod
    def execute(cls, preset) -> io.NodeOutput:
        made = sampling_preset(preset)
        return io.NodeOutput(made.steps, made.guidance_scale, made.shift, made.solver)


class Noise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VNoise",
            display_name="Wan S2V Noise",
            category=CATEGORY,
            **found_by("scheduler", "karras", "sigmas", "噪声"),
            description="Which noise a video begins from, and how the noise levels of its steps are spaced, between "
            "the loader and Wan S2V Sample. As it comes it is what runs without this node.",
            inputs=[
                S2VModel.Input("model"),
                io.Combo.Input(
                    "noise",
                    options=list(NOISES),
                    default=SamplingConfig.noise,
                    tooltip="cpu: the same on every device. reference: bfloat16, drawn on the card as originally.",
                ),
                io.Combo.Input(
                    "spacing",
                    options=list(SPACINGS),
                    default=SamplingConfig.spacing,
                    tooltip="Spacing of the noise levels. flow: the reference's.",
                ),
            ],
            outputs=[S2VModel.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model, noise, spacing) -> io.NodeOutput:
        check_link("model", model, Model)
        said = SamplingConfig(noise=noise, spacing=spacing)
        return io.NodeOutput(model.with_details(noise=said.noise, spacing=said.spacing))


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanS2VSample",
            display_name="Wan S2V Sample",
            category=CATEGORY,
            **found_by("sampler", "KSampler", "speech to video"),
            description="Makes all clips, each going on from the last. Finished clips are kept on disk, in "
            f"output/{CLIPS_FOLDER}, and the next run with the same inputs goes on after them.",
            inputs=[
                S2VModel.Input("model"),
                S2VVae.Input("vae", tooltip="Each clip is decoded, and its end encoded again for the next."),
                S2VConditioningSocket.Input("conditioning"),
                io.Int.Input("steps", default=40, min=1, max=1000, tooltip="Per clip. 40 is the reference's."),
                io.Float.Input(
                    "guidance_scale",
                    default=4.5,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Classifier-free guidance. 1.0 turns it off and halves the cost.",
                ),
                io.Float.Input(
                    "audio_guidance_scale",
                    default=0.0,
                    min=0.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Guidance of the voice apart from the prompt's, for a third forward a step. 0: the same.",
                ),
                io.Float.Input(
                    "shift",
                    default=3.0,
                    min=0.1,
                    max=100.0,
                    step=0.1,
                    tooltip="3 at 480p, 5 at 720p.",
                ),
                io.Combo.Input("solver", options=list(SOLVERS), default="unipc", tooltip="unipc is the reference's."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST_SEED,
                    control_after_generate=True,
                    tooltip="Clip r uses seed + r. The same seed gives the same noise on every device.",
                ),
                io.Boolean.Input(
                    "keep_clips",
                    default=False,
                    tooltip="Keep the lossless clips, latents and settings on disk after they have become a video.",
                ),
                io.Float.Input(
                    "colour_match",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Against colours that drift over many clips: pulls those of every clip towards the "
                    "picture's. Leave it at 0 where the light is meant to change.",
                ),
                io.Int.Input(
                    "leftover_gb",
                    default=50,
                    min=0,
                    max=1_000_000,
                    tooltip="Clips that earlier runs left on disk (cancelled, or never saved) may take so much. Beyond "
                    "it the oldest are deleted when a run starts, but none of the last day, and none with keep_clips. "
                    "0 deletes nothing.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[AUTO, *PRECISIONS],
                    default=AUTO,
                    tooltip="auto: bfloat16 on a card, float32 on a CPU. float8-weights: half the memory of bfloat16, "
                    "products still in bfloat16. float8 (RTX 40, H100 and later) and int8 (RTX 30, A100 and later): "
                    "products in 8 bits too, faster and less exact.",
                ),
                io.Combo.Input(
                    "offload",
                    options=list(OFFLOADS),
                    default=AUTO,
                    tooltip="auto: networks stay on the GPU until another one, or ComfyUI, needs their room, so the "
                    "next run starts at once. always: each leaves the GPU after its stage.",
                ),
                io.Int.Input(
                    "moe_expert_capacity",
                    default=0,
                    min=0,
                    max=10_000_000,
                    tooltip="Tokens that an expert takes at once: bounds the feed-forward's memory. 0: no bound. "
                    "S2V-14B is dense and has no experts.",
                ),
            ],
            outputs=[S2VClips.Output(display_name="clips"), io.Latent.Output(display_name="last latent")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """Changes when clips that were made of these are gone or no longer what was written: ComfyUI runs it again."""
        return MADE.losses(inputs)

    @classmethod
    def execute(
        cls, model, vae, conditioning, steps, guidance_scale, audio_guidance_scale, shift, solver, seed, keep_clips,
        colour_match, leftover_gb, precision, offload, moe_expert_capacity,
    ) -> io.NodeOutput:  # fmt: skip
        check_link("model", model, Model)
        check_link("vae", vae, Model)
        check_link("conditioning", conditioning, S2VConditioning)
        check_choice("offload", offload, OFFLOADS)
        details = model.details
        sampling = SamplingConfig(
            steps=steps,
            shift=shift,
            solver=solver,
            spacing=details.spacing,
            guidance_scale=guidance_scale,
            audio_guidance_scale=audio_guidance_scale or None,
            seed=seed,
            noise=details.noise,
            colour_match=colour_match,
            noise_boundary=None if model.low_noise is None else details.noise_boundary,
        )
        routing = ExpertRouting(
            top_k=details.top_k,
            expert_capacity=moe_expert_capacity or None,
            overflow=details.overflow,
            gate_dropout=details.gate_dropout,
            gate_dropout_seed=seed if details.gate_dropout else None,
        )
        networks = ComfyNetworks(model, vae, precision=precision, offload=offload)
        run = Run(networks, sampling, routing, keep_clips, check=check_interrupt)
        warn_of_cpu(run.config, networks.device)
        if model.accelerated_in:
            say(model.accelerated_in, attention_line(run.attention, networks.loading.acceleration))
        run.accept(conditioning)
        node, clips = cls.hidden.unique_id, conditioning.clips
        with clips_begun(run):
            make_room(leftover_gb, run.store.folder)
            if finished := len(run.stored.clip_frames):
                say(node, f"going on after clip {finished} of {clips}")
            films = ClipFilms(node, run.store, clips)
            for frames in run.clips(step_reporter(node, run.job, steps, finished)):
                films.add(frames)
            IN_USE.add(stored := run.stored)
        if run.expert_report:
            say(node, run.expert_report)
        MADE.note([node], stored.files, may_change=False)
        return io.NodeOutput(stored, latent_of(stored.latents(clips - 1)))
