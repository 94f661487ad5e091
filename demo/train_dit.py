"""Train the tiny S2V DiT of the embedded model on drawn faces that speak: flow matching on what the clip loop sees.

    python demo/train_dit.py --voices .demo/voices_train.npz --out .demo --minutes 9 --eval

Needs vae.safetensors (train_vae.py) and audio_encoder.safetensors/.json (train_audio.py) in --out. Writes
dit.safetensors (averaged weights, bfloat16), dit.json (settings and losses) and, with --eval, dit.png and
dit_eval.json.

A scene is 153 frames, the first 3 of them before its recording begins. It gives up to three training clips, one for
each way in which `sampling/clips.py` starts one:
- free: behind the reference picture, from frame -3 on, without a past; what the first clip of a video is.
- next: behind the 73 frames before it; what every other clip is.
- start: behind a grey video that ends with six times the picture; what the first clip is that starts from it.
In all three the target is what the VAE makes of the clip's own frames behind that lead-in, which is also what is put in
front of the sampled latents when they are decoded. A shorter clip is the beginning of a longer one: all is causal.
"""

import argparse
import json
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from fast_dit import prepare_training, routed_layers  # noqa: E402
from scene_feed import (  # noqa: E402
    FPS,
    HELD_OUT_SEED,
    SEEDS_PER_WORKER,
    SPEECH_HZ,
    DrawnScene,
    SceneFeed,
    SceneSettings,
    draw,
)
from tiny_checkpoint import TEXT_SIZES, vocabulary_size  # noqa: E402
from training import (  # noqa: E402
    BULKY,
    AveragedWeights,
    Muon,
    Ranks,
    TimeBox,
    box_mask,
    contact_sheet,
    learning_rate,
    load_weights,
    profiled,
    record_of,
    rounded,
    save_log,
    save_weights,
    spread,
    to_video,
)
from whole_vae import WholeVAE  # noqa: E402

from wan_s2v_core.bench.random_weights import fill_random  # noqa: E402
from wan_s2v_core.conditioning.audio import FEATURE_HZ, resample_features, voice_per_frame  # noqa: E402
from wan_s2v_core.conditioning.bundle import Voice, make_conditioning  # noqa: E402
from wan_s2v_core.conditioning.image import to_frames  # noqa: E402
from wan_s2v_core.conditioning.pose import pose_pixels  # noqa: E402
from wan_s2v_core.config import DEFAULT_NEGATIVE_PROMPT, S2VModelConfig, SamplingConfig, VideoConfig  # noqa: E402
from wan_s2v_core.geometry import FIRST_CLIP_SKIP, FRAMES_PER_LATENT, PIXELS_PER_LATENT, latent_frames_of  # noqa: E402
from wan_s2v_core.io.audio import Recording  # noqa: E402
from wan_s2v_core.model.audio_encoder import SPEECH_FEATURE_HZ, SpeechEncoder  # noqa: E402
from wan_s2v_core.model.checkpoint import DIT, VAE  # noqa: E402
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer, unpatchify  # noqa: E402
from wan_s2v_core.model.parts import Checkpoint  # noqa: E402
from wan_s2v_core.model.text_encoder import TextEncoder, clean_prompt, tokenizer_from_folder  # noqa: E402
from wan_s2v_core.model.vae import VideoVAE  # noqa: E402
from wan_s2v_core.networks import CheckpointNetworks  # noqa: E402
from wan_s2v_core.pipeline import S2VPipeline  # noqa: E402
from wan_s2v_core.prepare import plan_loading  # noqa: E402
from wan_s2v_core.sampling.clips import START_PICTURE_FRAMES  # noqa: E402
from wan_s2v_core.sampling.schedule import TRAIN_TIMESTEPS, shift_sigmas  # noqa: E402

TOKENIZER = HERE.parent / "assets" / "checkpoint" / "google" / "umt5-xxl"
CLIP_FRAMES, MOTION_FRAMES = 80, 73
KINDS = {"next": 0.5, "free": 0.35, "start": 0.15}
"""Ways in which a clip starts, and the share of the training batches that they get."""
LENGTHS = {20: 0.4, 10: 0.3, 5: 0.3}
"""Latent frames of a clip, and their share of the batches. Batches of short clips are larger."""
POSE_SHARE = 0.2
HEARS_PAST_SHARE = 0.2
UNGUIDED_SHARE = 0.1
"""Share of the clips with negative prompt and silence: the branch that guidance subtracts."""
ALONE_SHARE = 0.05
"""Share of those where one of the two alone is taken away."""
CONTINUOUS_SHARE = 0.4
"""Share of the clips whose reference picture is the frame before them; the others' is any frame of the scene."""


# --- the network ----------------------------------------------------------------------------------------------------


def make_config(options: argparse.Namespace, audio_width: int, audio_layers: int) -> S2VModelConfig:
    """The DiT's sizes: with experts where this pack has them, each of an equal share of the feed-forward's width."""
    has_experts = "num_experts" in {field.name for field in fields(S2VModelConfig)} and not options.dense
    experts = {"num_experts": options.experts, "top_k": options.top_k} if has_experts and options.experts else {}
    return S2VModelConfig(
        width=options.width,
        feed_forward_width=options.feed_forward // (options.experts if experts else 1),
        heads=options.heads,
        blocks=options.blocks,
        text_width=TEXT_SIZES["d_model"],
        time_width=options.time_width,
        audio_width=audio_width,
        audio_layers=audio_layers,
        injected_blocks=tuple(options.inject),
        **experts,
    )


@torch.no_grad()
def initialize(model: S2VTransformer) -> None:
    """Weights to begin with: streams of order one, a head and injections that add nothing yet, as the reference's."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.normal_(model.segment_embedding.weight, std=0.02)
    nn.init.normal_(model.time_projection.weight, std=0.02)
    nn.init.zeros_(model.head.out.weight)
    for block in model.stack.blocks:
        block.modulation.zero_()
        block.modulation[:, (2, 5)] = 0.3  # the gates
    model.head.modulation.zero_()
    for injector in model.stack.injectors:
        injector.attention.out.weight *= 0.1
        if hasattr(injector, "modulation"):
            injector.modulation.weight.zero_()


def start_model(config: S2VModelConfig, resumed: Path | None) -> S2VTransformer:
    """A new model, or the one that an earlier training wrote."""
    model = S2VTransformer(config)
    initialize(model)
    if resumed:
        model.load_state_dict({name: value.float() for name, value in load_weights(resumed).items()})
    return model


def block_matrices(model: S2VTransformer) -> list[nn.Parameter]:
    """The weights of the products in the blocks, which Muon trains; not gates and modulations."""
    apart = ("gate.", "modulation")
    return [
        value
        for name, value in model.stack.named_parameters()
        if value.ndim == 2 and not any(part in name for part in apart)
    ]


def balance_loss(model: S2VTransformer) -> tuple[Tensor, Tensor]:
    """How unevenly the experts are used, 1 at best, and the share of the choices that each got. Switch, eq. 4."""
    losses, shares = [], []
    for layer in routed_layers(model):
        logits, taken = layer.record.logits, layer.record.taken.float()
        share = taken.mean(0) / taken.sum(1).mean()
        losses.append(share.numel() * (share * logits.softmax(dim=1).mean(0)).sum())
        shares.append(share)
    return torch.stack(losses).mean(), torch.stack(shares)


def velocity(model: S2VTransformer, latents: Tensor, timesteps: Tensor, inputs: ClipInputs) -> Tensor:
    """`model.forward` with time and head in float32 in spite of autocast, as in inference. timesteps: B on the CPU."""
    condition = model.condition(inputs)
    with torch.autocast(latents.device.type, enabled=False):
        time_row, modulation = model.embed_time(timesteps)
    tokens, context = model.embed(latents, modulation, condition, float(timesteps.max()))
    tokens = model.stack(tokens.float(), context)
    with torch.autocast(latents.device.type, enabled=False):
        patches = model.head(context.segments(tokens)[0].float(), time_row)
    return unpatchify(patches, condition.grid)


# --- the frozen networks --------------------------------------------------------------------------------------------


def plain_prompt(prompt: str) -> str:
    """`clean_prompt`, or the same for our prompts where ftfy is missing."""
    try:
        return clean_prompt(prompt)
    except ImportError:
        return " ".join(unicodedata.normalize("NFKC", prompt).split())


def make_text_encoder(seed: int, tokenizer: Path = TOKENIZER) -> TextEncoder:
    """umT5 with random weights: its embeddings tell words apart, which is all that the prompts here need."""
    vocabulary = vocabulary_size((tokenizer / "spiece.model").read_bytes())
    encoder = TextEncoder(TEXT_SIZES | {"vocab_size": vocabulary}, tokenizer_from_folder(tokenizer))
    fill_random(encoder, seed)
    return encoder


def load_speech_encoder(folder: Path) -> tuple[SpeechEncoder, dict]:
    """The trained audio encoder, rounded as it will be packed, and its settings."""
    settings = json.loads((folder / "audio_encoder.json").read_text(encoding="utf-8"))
    settings = settings.get("settings", settings)
    encoder = SpeechEncoder(settings)
    encoder.load_state_dict(rounded(load_weights(folder / "audio_encoder.safetensors")))
    return encoder.eval().requires_grad_(False), settings


def load_tiny_vae(path: Path) -> VideoVAE:
    weights = load_weights(path)
    vae = VideoVAE(weights["encoder.conv_in.weight"].shape[0])
    vae.network.load_state_dict(rounded(weights))
    return vae.eval().requires_grad_(False)


class Encoders:
    """VAE, audio and text encoder, frozen."""

    def __init__(self, folder: Path, device: torch.device, text_seed: int):
        self.device = device
        self.vae = WholeVAE(load_tiny_vae(folder / "vae.safetensors")).to(device)
        self.speech, self.speech_settings = load_speech_encoder(folder)
        self.speech = self.speech.to(device)
        self.text_encoder = make_text_encoder(text_seed)
        self.prompts: dict[str, Tensor] = {}

    @torch.no_grad()
    def latents(self, video: Tensor) -> Tensor:
        """1 3 T H W -> C F h w in float16, coded in bfloat16 on a card: its error is far below the noise added."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.vae.encode(video)[0].half()

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """1 L E."""
        if prompt not in self.prompts:
            ids = torch.tensor([self.text_encoder.tokenizer(plain_prompt(prompt))])
            self.prompts[prompt] = self.text_encoder.encode_ids(ids, torch.ones_like(ids)).to(self.device)
        return self.prompts[prompt]

    @torch.no_grad()
    def features(self, samples: np.ndarray) -> Tensor:
        """A T E at 30 Hz."""
        hidden = self.speech.hidden_states(torch.from_numpy(samples))
        return resample_features(hidden, SPEECH_FEATURE_HZ, FEATURE_HZ)


# --- what is trained on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingClip:
    """One clip on the device, latents in float16."""

    target: Tensor
    """C F h w."""
    motion: Tensor | None
    """C F h w."""
    reference: Tensor
    """C 1 h w."""
    pose: Tensor | None
    audio: Tensor
    """A E T."""
    audio_past: Tensor | None
    text: Tensor
    """L E."""
    mouths: Tensor
    """F 4: box in latent positions."""


def latent_boxes(mouths: np.ndarray) -> np.ndarray:
    """T 4 pixels -> F 4 latent positions that hold the mouth in any of a latent frame's video frames."""
    grouped = mouths[: len(mouths) // FRAMES_PER_LATENT * FRAMES_PER_LATENT].reshape(-1, FRAMES_PER_LATENT, 4)
    low = grouped[..., :2].min(1) // PIXELS_PER_LATENT
    high = -(-grouped[..., 2:].max(1) // PIXELS_PER_LATENT)
    return np.concatenate([low, high], axis=1)


class ClipMaker:
    """Turns a drawn scene into training clips, exactly as `generate_clips` would meet them."""

    def __init__(self, encoders: Encoders, options: argparse.Namespace, rng: np.random.Generator):
        self.encoders, self.rng = encoders, rng
        self.frames, self.past = options.clip_frames, options.motion_frames
        self.start_share = options.start_share

    @torch.no_grad()
    def clips(self, scene: DrawnScene) -> Iterator[tuple[str, TrainingClip]]:
        encoders, frames, past = self.encoders, self.frames, self.past
        video = to_video(scene.pixels, encoders.device)
        features = encoders.features(scene.samples)
        voice = voice_per_frame(features, video.shape[2], FPS, FIRST_CLIP_SKIP)[0]  # A E T
        text = encoders.text(scene.prompt)[0]

        def clip(kind: str, start: int, lead_in: Tensor, lead_latents: int, reference: Tensor) -> TrainingClip:
            latents = encoders.latents(torch.cat([lead_in, video[:, :, start : start + frames]], dim=2))
            lead, target = latents[:, :lead_latents], latents[:, lead_latents:]
            return TrainingClip(
                target=target.clone(),
                motion=None if kind == "free" else lead.clone(),
                reference=lead.clone() if kind == "free" else encoders.latents(reference),
                pose=self.pose(scene, start),
                audio=voice[..., start : start + frames].clone(),
                audio_past=voice[..., start - past : start].clone() if kind == "next" else None,
                text=text,
                mouths=torch.from_numpy(latent_boxes(scene.mouths[start : start + frames])).to(encoders.device),
            )

        reference = self.reference(video, 0)
        yield "free", clip("free", 0, reference, 1, reference)
        motion_latents = latent_frames_of(past)
        yield "next", clip("next", past, video[:, :, :past], motion_latents, self.reference(video, past))
        if self.rng.random() < self.start_share:
            reference = self.reference(video, FIRST_CLIP_SKIP)
            grey = torch.zeros_like(video[:, :, :1]).expand(-1, -1, past, -1, -1).clone()
            grey[:, :, -START_PICTURE_FRAMES:] = reference
            yield "start", clip("start", FIRST_CLIP_SKIP, grey, motion_latents, reference)

    def reference(self, video: Tensor, start: int) -> Tensor:
        """A picture of the same face: the frame before the clip, or any."""
        before = max(0, start - 1)
        picked = before if self.rng.random() < CONTINUOUS_SHARE else int(self.rng.integers(video.shape[2]))
        return video[:, :, picked : picked + 1]

    def pose(self, scene: DrawnScene, start: int) -> Tensor | None:
        """As S2VPipeline.encode_pose: frames before time 0 show the first pose."""
        if scene.pose is None:
            return None
        picked = np.maximum(np.arange(start, start + self.frames), FIRST_CLIP_SKIP)
        drawn = torch.from_numpy(scene.pose[picked]).to(self.encoders.device)
        return self.encoders.latents(pose_pixels(drawn, self.frames, *drawn.shape[1:3]))[:, 1:]


class ClipBuffer:
    """The last clips of every kind."""

    def __init__(self, size: int):
        self.size, self.clips, self.added = size, {kind: [] for kind in KINDS}, dict.fromkeys(KINDS, 0)

    def __len__(self) -> int:
        return sum(map(len, self.clips.values()))

    def take(self, maker: ClipMaker, scenes: Iterable[DrawnScene]) -> None:
        for scene in scenes:
            for kind, clip in maker.clips(scene):
                self.add(kind, clip)

    def add(self, kind: str, clip: TrainingClip) -> None:
        kept = self.clips[kind]
        if len(kept) < self.size * KINDS[kind]:
            kept.append(clip)
        else:
            kept[self.added[kind] % len(kept)] = clip
        self.added[kind] += 1

    def sample(self, count: int, frames: int, rng: np.random.Generator) -> tuple[ClipInputs, Tensor, Tensor]:
        """A batch of one kind: inputs, clean latents B C F h w, mouth boxes B F 4."""
        names = [kind for kind in KINDS if self.clips[kind]]
        shares = np.array([KINDS[kind] for kind in names])
        kind = names[rng.choice(len(names), p=shares / shares.sum())]
        known = self.clips[kind]
        if rng.random() < POSE_SHARE:
            known = [clip for clip in known if clip.pose is not None] or known
        clips = [known[i] for i in rng.integers(len(known), size=count)]
        has_pose = known is not self.clips[kind]
        hears_past = kind == "next" and rng.random() < HEARS_PAST_SHARE
        longest = max(len(clip.text) for clip in clips)
        video_frames = FRAMES_PER_LATENT * frames
        inputs = ClipInputs(
            reference_latents=torch.stack([clip.reference for clip in clips]).float(),
            motion_latents=None if kind == "free" else torch.stack([clip.motion for clip in clips]).float(),
            pose_latents=torch.stack([clip.pose[:, :frames] for clip in clips]).float() if has_pose else None,
            audio=torch.stack([clip.audio[..., :video_frames] for clip in clips]),
            text=torch.stack([F.pad(clip.text, (0, 0, 0, longest - len(clip.text))) for clip in clips]),
            motion_frames=MOTION_FRAMES,
            audio_past=torch.stack([clip.audio_past for clip in clips]) if hears_past else None,
        )
        target = torch.stack([clip.target[:, :frames] for clip in clips]).float()
        return inputs, target, torch.stack([clip.mouths[:frames] for clip in clips])


def drop_conditions(inputs: ClipInputs, negative: Tensor, rng: np.random.Generator) -> ClipInputs:
    """Give some of a batch what the other branches of guidance see: the negative prompt, silence, or both."""
    chances = rng.random((3, len(inputs.text)))
    unguided = chances[0] < UNGUIDED_SHARE
    silent, wordless = (unguided | (chance < ALONE_SHARE) for chance in chances[1:])
    rows = max(inputs.text.shape[1], negative.shape[1])
    text, other = (F.pad(t, (0, 0, 0, rows - t.shape[1])) for t in (inputs.text, negative))

    def flags(values: np.ndarray, dims: int) -> Tensor:
        return torch.from_numpy(values).to(text.device).view(-1, *[1] * (dims - 1))

    past = inputs.audio_past
    return replace(
        inputs,
        text=torch.where(flags(wordless, 3), other, text),
        audio=inputs.audio.masked_fill(flags(silent, 4), 0.0),
        audio_past=None if past is None else past.masked_fill(flags(silent, 4), 0.0),
    )


def draw_sigmas(count: int, kind: str, shift: float, rng: np.random.Generator) -> np.ndarray:
    """Noise levels: uniform or logit-normal, then moved by the sampler's shift."""
    plain = 1 / (1 + np.exp(-rng.normal(size=count))) if kind == "logit-normal" else stratified(count, rng)
    return shift_sigmas(plain, shift)


def stratified(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform in 0..1, one in each of `count` equal parts: a batch sees all noise levels."""
    return (rng.permutation(count) + rng.random(count)) / count


def flow_loss(
    model: S2VTransformer,
    inputs: ClipInputs,
    clean: Tensor,
    boxes: Tensor,
    sigmas: np.ndarray,
    mouth_weight: float,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weighted and plain mean squared error of the velocity, noise - clean."""
    sigma = torch.from_numpy(sigmas).float()
    noise, level = torch.randn_like(clean), sigma.to(clean.device).view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * clean + level * noise
    with torch.autocast(clean.device.type, precision, enabled=precision != torch.float32):
        predicted = velocity(model, noisy, sigma * TRAIN_TIMESTEPS, inputs)
    error = (predicted.float() - (noise - clean)).square().mean(dim=1)  # B F h w
    weight = 1 + (mouth_weight - 1) * box_mask(boxes, *error.shape[-2:])
    return (error * weight).sum() / weight.sum(), error.detach().mean()


# --- training -------------------------------------------------------------------------------------------------------


def scene_settings(options: argparse.Namespace) -> SceneSettings:
    return SceneSettings(
        str(options.voices),
        options.clip_frames + options.motion_frames,
        lead=FIRST_CLIP_SKIP,
        size_px=options.size,
        supersample=options.supersample,
        pose_share=options.pose_share,
    )


def train(options: argparse.Namespace) -> dict:
    """Train and write -> the log."""
    record = record_of(options)  # before anything is written over
    ranks = Ranks()
    device = ranks.device(options.device)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_num_threads(1)  # the workers that draw keep the others busy
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(options.seed)
    rng = np.random.default_rng([options.seed, ranks.rank])
    feed = SceneFeed(
        scene_settings(options), options.workers, options.first_seed + ranks.rank * options.workers * SEEDS_PER_WORKER
    )
    encoders = Encoders(options.out, device, options.text_seed)
    speech = encoders.speech_settings
    config = make_config(options, speech["hidden_size"], speech["num_hidden_layers"] + 1)
    model = start_model(config, options.resume).to(device)
    torch.manual_seed(options.seed + ranks.rank)
    prepare_training(model.train(), options.gate_dropout)
    average = AveragedWeights(model, options.average)
    parameters, matrices = list(model.parameters()), block_matrices(model) if options.muon else []
    others = [value for value in parameters if id(value) not in set(map(id, matrices))]
    muon = Muon(matrices)
    optimizer = torch.optim.AdamW(
        others, lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    negative = encoders.text(DEFAULT_NEGATIVE_PROMPT)
    maker, buffer = ClipMaker(encoders, options, rng), ClipBuffer(options.buffer)
    while len(buffer) < options.first_clips:
        buffer.take(maker, feed.wait())
    box, losses, step, samples, latent_frames = TimeBox(options.minutes), [], 0, 0, 0
    lengths = [length for length in LENGTHS if FRAMES_PER_LATENT * length <= options.clip_frames]
    shares = np.array([LENGTHS[length] for length in lengths])
    told, load, mean_loss = (time.monotonic(), 0), 0.0, 0.0
    count = sum(value.numel() for value in parameters)
    print(f"{count} parameters, {len(buffer)} clips, {config.to_dict()}", flush=True)
    while (share := ranks.agreed(box.share)) < 1.0 and step < options.steps:
        buffer.take(maker, feed.arrived(step % options.encode_every == 0))
        frames = lengths[rng.choice(len(lengths), p=shares / shares.sum())]
        inputs, clean, boxes = buffer.sample(options.batch * (max(lengths) // frames), frames, rng)
        inputs = drop_conditions(inputs, negative, rng)
        if inputs.motion_latents is not None and options.motion_noise and rng.random() < 0.5:
            amount = options.motion_noise * rng.random()
            past = inputs.motion_latents
            inputs = replace(inputs, motion_latents=past + amount * torch.randn_like(past))
        sigmas = draw_sigmas(len(clean), options.sigmas, options.shift, rng)
        rate = learning_rate(1.0, share, step, options.warm_up)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        loss, plain = flow_loss(model, inputs, clean, boxes, sigmas, options.mouth_weight, precision)
        total = loss
        if routed_layers(model):
            balance, expert_shares = balance_loss(model)
            total = loss + options.balance * balance
            load = 0.99 * load + 0.01 * expert_shares.detach() if step else expert_shares.detach()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        ranks.average_gradients(parameters)
        mean_loss = 0.99 * mean_loss + 0.01 * plain if step else plain
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        optimizer.step()
        muon.step(options.muon_lr * rate)
        average.update(model)
        step, samples, latent_frames = step + 1, samples + len(clean), latent_frames + clean.shape[2] * len(clean)
        if step % options.log_every == 0 and ranks.is_first:
            smooth = {"loss": loss.item(), "mean": mean_loss.item(), "norm": norm.item()}
            now = time.monotonic()
            pace, told = (latent_frames - told[1]) / (now - told[0]), (now, latent_frames)
            losses.append({"step": step, "seconds": round(box.elapsed, 1), "frames": frames, **smooth})
            print(
                f"{step} {box.elapsed:.0f}s F {frames} "
                + " ".join(f"{name} {value:.4f}" for name, value in smooth.items())
                + f" lr {optimizer.param_groups[0]['lr']:.2g}, {samples} samples, {pace:.0f} latent frames/s, "
                f"{feed.frames_per_second:.0f} frames/s drawn, {len(buffer)} clips",
                flush=True,
            )
    feed.close()
    ranks.close()
    if not ranks.is_first:
        return {}
    weights = {name: value.bfloat16() for name, value in average.state().items()}
    save_weights(weights, options.out / "dit.safetensors", {"config": json.dumps(config.to_dict()), "steps": str(step)})
    log = {
        **record,
        "ranks": ranks.count,
        "config": config.to_dict(),
        "parameters": count,
        "text_seed": options.text_seed,
        "steps": step,
        "samples": samples,
        "seconds": round(box.elapsed, 1),
        "scenes": feed.scenes,
        "clips": dict(buffer.added),
        "frames_per_second_drawn": feed.frames_per_second,
        "expert_load": load.tolist() if isinstance(load, Tensor) else None,
        "losses": losses,
    }
    save_log(options.out / "dit.json", log)
    print({name: value for name, value in log.items() if name not in BULKY}, flush=True)
    if options.eval:
        del buffer, optimizer
        judge(options, encoders, config, {name: value.float() for name, value in weights.items()})
    return log


# --- what came of it ------------------------------------------------------------------------------------------------


def networks_in_memory(dit: S2VTransformer, vae: VideoVAE, device: torch.device) -> CheckpointNetworks:
    """What sampling needs, in float32 on the device."""
    loading = plan_loading("float32", device)
    networks = CheckpointNetworks(Checkpoint({}), loading)
    for kind, network in ((DIT, dit), (VAE, vae)):
        loading.finish(kind, network.eval().requires_grad_(False))
        networks.put(kind, network.to(device))
    return networks


INSIDE_OF_MOUTH = (86, 24, 30)
INSIDE_TOLERANCE = 60


def mouth_darkness(frames: np.ndarray, box: np.ndarray) -> np.ndarray:
    """How much of the inside of the mouth each frame shows, from colours in a box: T H W 3 uint8 -> T."""
    left, top, right, bottom = (int(v) for v in box)
    part = frames[:, top:bottom, left:right].astype(float)
    return (np.linalg.norm(part - INSIDE_OF_MOUTH, axis=-1) < INSIDE_TOLERANCE).mean(axis=(1, 2))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() < 1e-6 or b.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def sample_video(
    networks: CheckpointNetworks, scene: DrawnScene, voice: Voice, texts: tuple[Tensor, Tensor], config: SamplingConfig
) -> np.ndarray:
    """The video that the real clip loop makes of a held-out scene's first picture and voice. T H W 3 uint8."""
    picture = torch.from_numpy(np.array(scene.pixels[FIRST_CLIP_SKIP]))
    video = VideoConfig(max_area=picture.shape[0] * picture.shape[1])
    conditioning = make_conditioning(picture, voice, *(text.cpu() for text in texts), video)
    clips = S2VPipeline(networks).generate(conditioning, config)
    return torch.cat([to_frames(clip.video[0].cpu()) for clip in clips]).numpy()


def judge(options: argparse.Namespace, encoders: Encoders, config: S2VModelConfig, weights: dict[str, Tensor]) -> None:
    """Sample held-out scenes with the real clip loop; a contact sheet, and whether the mouth follows the voice."""
    from voices import load_voices

    model = S2VTransformer(config)
    model.load_state_dict(weights)
    networks = networks_in_memory(model, load_tiny_vae(options.out / "vae.safetensors"), encoders.device)
    recordings = load_voices(options.held_out)
    settings = SceneSettings(
        str(options.held_out), 3 + round(FPS * options.eval_seconds), 3, options.size, options.supersample
    )
    rows, results = [], []
    for number in range(options.judged):
        scene = draw(HELD_OUT_SEED + number, recordings, settings)
        recording = Recording(torch.from_numpy(scene.samples)[None], SPEECH_HZ)
        voice = Voice(recording, encoders.features(scene.samples).cpu())
        texts = encoders.text(scene.prompt), encoders.text(DEFAULT_NEGATIVE_PROMPT)
        truth, openings = scene.pixels[FIRST_CLIP_SKIP:], scene.openings[FIRST_CLIP_SKIP:]
        box = np.concatenate([scene.mouths[:, :2].min(0), scene.mouths[:, 2:].max(0)])
        known = correlation(mouth_darkness(truth, box), openings)
        shown = spread(len(truth), 10)
        rows.append([truth[i] for i in shown])
        for guidance in options.eval_guidance:
            began = time.monotonic()
            sampling = SamplingConfig(steps=options.eval_steps, guidance_scale=guidance, seed=number)
            made = sample_video(networks, scene, voice, texts, sampling)
            dark = mouth_darkness(made, box)
            results.append(
                {
                    "scene": number,
                    "guidance": guidance,
                    "frames": len(made),
                    "seconds": round(time.monotonic() - began, 2),
                    "correlation": correlation(dark, openings[: len(dark)]),
                    "correlation_of_truth": known,
                    "mean_opening": float(dark.mean()),
                    "mean_opening_of_truth": float(mouth_darkness(truth, box).mean()),
                }
            )
            rows.append([made[i] for i in shown])
            print(results[-1], flush=True)
    contact_sheet(rows, options.out / "dit.png")
    save_log(options.out / "dit_eval.json", {"steps": options.eval_steps, "results": results})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--voices", type=Path, default=Path(".demo/voices_train.npz"))
    add("--held_out", type=Path, default=Path(".demo/voices_heldout.npz"))
    add("--out", type=Path, default=Path(".demo"))
    add("--minutes", type=float, default=9.0)
    add("--steps", type=int, default=1 << 30, help="at most so many")
    add("--resume", type=Path, help="a dit.safetensors to go on from")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=14)
    add("--seed", type=int, default=0)
    add("--first_seed", type=int, default=500_000, help="of the scenes")
    add("--text_seed", type=int, default=0, help="of the text encoder's random weights")
    add("--width", type=int, default=192)
    add("--heads", type=int, default=6)
    add("--blocks", type=int, default=6)
    add("--feed_forward", type=int, default=512, help="of all experts together")
    add("--time_width", type=int, default=128)
    add("--inject", type=int, nargs="+", default=[0, 2, 4])
    add("--experts", type=int, default=8)
    add("--top_k", type=int, default=4)
    add("--balance", type=float, default=0.01)
    add("--gate_dropout", type=float, default=0.05)
    add("--dense", action="store_true", help="the sibling without experts")
    add("--size", type=int, default=256)
    add("--supersample", type=int, default=2)
    add("--clip_frames", type=int, default=CLIP_FRAMES)
    add("--motion_frames", type=int, default=MOTION_FRAMES)
    add("--pose_share", type=float, default=0.25, help="share of the scenes with pose drawings")
    add("--start_share", type=float, default=0.3, help="share of the scenes that also give a clip of kind start")
    add("--batch", type=int, default=4, help="clips of the longest kind; of shorter ones as many frames")
    add("--buffer", type=int, default=8000, help="clips kept on the device, 1.3 MB each")
    add("--first_clips", type=int, default=64, help="needed before training begins")
    add("--encode_every", type=int, default=4, help="a new scene is encoded once in so many steps")
    add("--shift", type=float, default=3.0)
    add("--sigmas", choices=("uniform", "logit-normal"), default="uniform")
    add("--mouth_weight", type=float, default=3.0)
    add("--motion_noise", type=float, default=0.1, help="at most so much noise on the past, against drift")
    add("--lr", type=float, default=3e-3)
    add("--muon_lr", type=float, default=4e-3, help="of the matrices in the blocks")
    add("--no-muon", dest="muon", action="store_false", help="all with AdamW")
    add("--warm_up", type=int, default=200)
    add("--clip", type=float, default=1.0)
    add("--average", type=float, default=0.999)
    add("--log_every", type=int, default=50)
    add("--profile", action="store_true", help="tell where the time goes; with --steps 40 or so")
    add("--eval", action="store_true")
    add("--eval_steps", type=int, default=12)
    add("--eval_seconds", type=float, default=7.0)
    add("--eval_guidance", type=float, nargs="+", default=[1.0, 3.0])
    add("--judged", type=int, default=2, help="held-out scenes")
    return parser


if __name__ == "__main__":
    chosen = make_parser().parse_args()
    profiled(train, chosen) if chosen.profile else train(chosen)
