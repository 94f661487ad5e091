"""Train the tiny video VAE of the embedded model: the Wan 2.1 VAE with few channels, on drawn faces.

    python demo/train_vae.py --voices .demo/voices_train.npz --out .demo --minutes 6

Writes vae.safetensors (diffusers' names, normalised latents, values that bfloat16 holds), vae.json (losses, PSNR on
held-out faces) and vae.png (originals above, reconstructions below).
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from scene_feed import HELD_OUT_SEED, DrawnScene, SceneFeed, SceneSettings, draw  # noqa: E402
from training import (  # noqa: E402
    TimeBox,
    box_mask,
    contact_sheet,
    learning_rate,
    load_weights,
    rounded,
    save_log,
    save_weights,
    spread,
    to_bytes,
    to_video,
)
from whole_vae import WholeVAE, fold_statistics  # noqa: E402

from wan_s2v_core.acceleration.convolution import flatten_convolutions  # noqa: E402
from wan_s2v_core.model.vae import VideoVAE  # noqa: E402

WIDTH = 8
LAYOUTS = ("last", "plain", "flat")
SCENE_FRAMES = 49
CLIP_FRAMES = 17
GRADIENT_WEIGHT = 1.0
KL_WEIGHT = 3e-4
MOUTH_WEIGHT = 4.0
"""How much more a pixel of the mouth counts than another."""
JUMP_SHARE = 0.15
"""Share of the clips whose first frame is another one of the scene: a clip behind a reference picture."""
GREY_SHARE = 0.08
"""Share of the clips that begin with grey frames: the past of a video that starts from its picture."""
POSE_SHARE = 0.1


class ScenePool:
    """The last `size` scenes on the device, so that training never waits for drawings."""

    def __init__(self, size: int, settings: SceneSettings, device: torch.device):
        side = settings.size_px
        self.pixels = torch.empty(size, settings.frames, side, side, 3, dtype=torch.uint8, device=device)
        self.mouths = torch.zeros(size, settings.frames, 4, dtype=torch.int16, device=device)
        self.size, self.added = size, 0

    def __len__(self) -> int:
        return min(self.added, self.size)

    def add(self, scene: DrawnScene) -> None:
        self._add(scene.pixels, scene.mouths)
        if scene.pose is not None:
            self._add(scene.pose, np.zeros_like(scene.mouths))

    def _add(self, pixels: np.ndarray, mouths: np.ndarray) -> None:
        place = self.added % self.size
        self.pixels[place].copy_(torch.from_numpy(np.array(pixels)))
        self.mouths[place].copy_(torch.from_numpy(mouths))
        self.added += 1

    def sample(self, count: int, frames: int, crop_px: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Clips B 3 T H W in [-1, 1] and the mouth's mask B 1 T H W; crops lie around the face more often than not."""
        videos, masks = [], []
        whole = self.pixels.shape[2]
        for _ in range(count):
            scene = int(rng.integers(len(self)))
            start = int(rng.integers(self.pixels.shape[1] - frames + 1))
            picked = np.arange(start, start + frames)
            if rng.random() < JUMP_SHARE:
                picked[0] = rng.integers(self.pixels.shape[1])
            left, top = (int(v) for v in np.clip(rng.normal(0.5, 0.25, 2), 0, 1) * (whole - crop_px))
            video = self.pixels[scene, picked][:, top : top + crop_px, left : left + crop_px]
            boxes = self.mouths[scene, picked].float() - self.mouths.new_tensor((left, top, left, top)).float()
            video = video.movedim(-1, 0).float() / 127.5 - 1
            if rng.random() < GREY_SHARE:
                video[:, : int(rng.integers(1, frames - 1))] = 0.0
            videos.append(video)
            masks.append(box_mask(boxes, crop_px, crop_px)[None])
        return torch.stack(videos), torch.stack(masks)


def gradients(video: Tensor) -> tuple[Tensor, Tensor]:
    return video.diff(dim=-1), video.diff(dim=-2)


def vae_loss(network: WholeVAE, video: Tensor, mouth: Tensor, precision: torch.dtype) -> dict[str, Tensor]:
    """Losses of one batch; `total` is what is minimised."""
    with torch.autocast(video.device.type, precision, enabled=precision != torch.float32):
        mean, log_variance = (t.float() for t in network.moments(video))
        raw = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        made = network.pixels(raw).float()
    weight = 1 + (MOUTH_WEIGHT - 1) * mouth
    pixel = ((made - video).abs() * weight).mean() / weight.mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(made), gradients(video), strict=True)) / 2
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    total = pixel + GRADIENT_WEIGHT * edges + KL_WEIGHT * divergence
    return {"total": total, "pixel": pixel, "edges": edges, "divergence": divergence}


def set_layout(network: WholeVAE, layout: str) -> None:
    """How convolutions run: as they are, with channels last, or as 2D ones with the frames as channels."""
    for layer in network.modules():
        layer.__dict__.pop("_conv_forward", None)
        if isinstance(layer, nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d if layout == "last" else torch.contiguous_format)
        elif isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last if layout != "plain" else torch.contiguous_format)
    if layout == "flat":
        flatten_convolutions(network)


def rms_norm(x: Tensor, gamma: Tensor, scale: float) -> Tensor:
    """WanRMS_norm in a few steps that a compiler makes one of."""
    wide = x.float()
    return (wide * (scale / wide.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)) * gamma).to(x.dtype)


def compile_norms(network: WholeVAE) -> None:
    """Let the norms run as one kernel each; where nothing can be compiled they run step by step."""
    torch._dynamo.config.suppress_errors = True
    compiled = torch.compile(rms_norm, dynamic=True)
    for layer in network.modules():
        if type(layer).__name__ == "WanRMS_norm":
            layer.forward = lambda x, layer=layer: compiled(x, layer.gamma, layer.scale)


def restore_norms(network: WholeVAE) -> None:
    for layer in network.modules():
        if type(layer).__name__ == "WanRMS_norm":
            layer.__dict__.pop("forward", None)


def seconds_per_step(network: WholeVAE, video: Tensor, mouth: Tensor, precision: torch.dtype, steps: int = 4) -> float:
    for step in range(steps + 2):
        if step == 2:
            torch.cuda.synchronize()
            began = time.monotonic()
        vae_loss(network, video, mouth, precision)["total"].backward()
        network.zero_grad()
    torch.cuda.synchronize()
    return (time.monotonic() - began) / steps


def choose_kernels(network: WholeVAE, video: Tensor, mouth: Tensor, precision: torch.dtype) -> None:
    """Measure the ways in which a step can run on this card, and keep the fastest."""
    if video.device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True
    seconds = {}
    for layout in LAYOUTS:
        set_layout(network, layout)
        seconds[layout] = seconds_per_step(network, video, mouth, precision)
    best = min(seconds, key=seconds.get)
    set_layout(network, best)
    compile_norms(network)
    seconds["compiled norms"] = seconds_per_step(network, video, mouth, precision)
    if seconds["compiled norms"] > seconds[best]:
        restore_norms(network)
    print({name: round(value, 4) for name, value in seconds.items()}, "seconds per step; layout", best, flush=True)


@torch.no_grad()
def latent_statistics(network: WholeVAE, pool: ScenePool, batches: int, rng: np.random.Generator, frames: int):
    """Mean and deviation of every channel of the latents, over whole pictures."""
    whole, total, squares, count = pool.pixels.shape[2], 0.0, 0.0, 0
    for _ in range(batches):
        mean, _ = network.moments(pool.sample(1, frames, whole, rng)[0])
        flat = mean.double().transpose(0, 1).flatten(1)
        total, squares, count = total + flat.sum(1), squares + (flat**2).sum(1), count + flat.shape[1]
    centre = total / count
    return centre.float(), (squares / count - centre**2).clamp(min=1e-8).sqrt().float()


@torch.no_grad()
def judge(network: WholeVAE, scenes: list[DrawnScene], device: torch.device, sheet: Path | None) -> dict[str, float]:
    """PSNR on held-out scenes, of the whole picture and of the mouth, and how the latents are spread."""
    errors, mouth_errors, latents, rows = [], [], [], []
    for scene in scenes:
        frames = 4 * ((len(scene.pixels) - 1) // 4) + 1
        video = to_video(scene.pixels[:frames], device)
        code = network.encode(video)
        made = network.decode(code)
        error = ((made - video) / 2) ** 2
        mask = box_mask(torch.from_numpy(scene.mouths[:frames]).to(device).float(), *video.shape[-2:])
        errors.append(error.mean().item())
        mouth_errors.append(((error * mask).sum() / (3 * mask.sum().clamp(min=1))).item())
        latents.append(code.float().std(dim=(0, 2, 3, 4)).mean().item())
        shown = spread(frames, 6)
        rows += [[to_bytes(v[0])[i].numpy() for i in shown] for v in (video, made)]
    if sheet:
        contact_sheet(rows[:8], sheet)
    psnr, mouth_psnr = (float(-10 * np.log10(np.mean(values))) for values in (errors, mouth_errors))
    return {"psnr": psnr, "mouth_psnr": mouth_psnr, "latent_deviation": float(np.mean(latents))}


def finish(network: WholeVAE, pool: ScenePool, options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Normalise the latents and round the weights, in place."""
    mean, std = latent_statistics(network, pool, options.statistics, rng, options.clip_frames)
    fold_statistics(network.vae, mean, std)
    network.network.load_state_dict(rounded(network.network.state_dict()))


def train(options: argparse.Namespace) -> dict:
    """Train, normalise, judge and write -> the log."""
    device = torch.device(options.device)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    settings = SceneSettings(
        str(options.voices),
        options.scene_frames,
        size_px=options.size,
        supersample=options.supersample,
        pose_share=POSE_SHARE,
    )
    feed = SceneFeed(settings, options.workers, options.first_seed)
    network = WholeVAE(VideoVAE(options.width)).to(device)
    if options.resume:
        network.network.load_state_dict(load_weights(options.resume))
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    pool = ScenePool(options.pool, settings, device)
    while len(pool) < options.first_scenes:
        for scene in feed.wait():
            pool.add(scene)
    crops = (options.size // options.crop) ** 2
    choose_kernels(network, *pool.sample(options.batch * crops, options.clip_frames, options.crop, rng), precision)
    box, losses, step, told = TimeBox(options.minutes), [], 0, time.monotonic()
    print(f"training with {len(pool)} scenes, {sum(p.numel() for p in network.parameters())} parameters", flush=True)
    while not box.is_over and step < options.steps:
        for scene in feed.arrived(2):
            pool.add(scene)
        is_cropped = box.share < options.crop_share
        side, count = (options.crop, options.batch * crops) if is_cropped else (options.size, options.batch)
        video, mouth = pool.sample(count, options.clip_frames, side, rng)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.lr, box.share, step, 50)
        found = vae_loss(network, video, mouth, precision)
        optimizer.zero_grad(set_to_none=True)
        found["total"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % options.log_every == 0:
            values = {name: round(value.item(), 5) for name, value in found.items()}
            pace = options.log_every * count * options.clip_frames / (time.monotonic() - told)
            told = time.monotonic()
            losses.append({"step": step, "seconds": round(box.elapsed, 1), **values})
            print(
                f"{step} {box.elapsed:.0f}s {values} lr {optimizer.param_groups[0]['lr']:.2g} crop {side} "
                f"{pace:.0f} frames/s trained, {feed.frames_per_second:.0f} frames/s drawn, pool {len(pool)}",
                flush=True,
            )
    feed.close()
    set_layout(network.eval(), "plain")
    restore_norms(network)
    finish(network, pool, options, rng)
    weights = network.network.state_dict()
    save_weights(weights, options.out / "vae.safetensors", {"width": str(options.width), "steps": str(step)})
    held_out = draw_held_out(options.held_out, settings, options.judged)
    result = judge(network, held_out, device, options.out / "vae.png")
    log = {"steps": step, "frames_per_second_drawn": feed.frames_per_second, **result, "losses": losses}
    save_log(options.out / "vae.json", log)
    print({name: value for name, value in log.items() if name != "losses"}, flush=True)
    return log


def draw_held_out(voices: Path, settings: SceneSettings, count: int) -> list[DrawnScene]:
    from voices import load_voices

    recordings = load_voices(Path(voices))
    return [draw(HELD_OUT_SEED + number, recordings, settings) for number in range(count)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voices", type=Path, default=Path(".demo/voices_train.npz"))
    parser.add_argument("--held_out", type=Path, default=Path(".demo/voices_heldout.npz"))
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--steps", type=int, default=1 << 30, help="at most so many")
    parser.add_argument("--resume", type=Path, help="a vae.safetensors to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first_seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--supersample", type=int, default=2)
    parser.add_argument("--scene_frames", type=int, default=SCENE_FRAMES)
    parser.add_argument("--clip_frames", type=int, default=CLIP_FRAMES)
    parser.add_argument("--batch", type=int, default=6, help="whole pictures; crops of half the side: four times more")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--crop_share", type=float, default=0.6, help="share of the time that crops are trained on")
    parser.add_argument("--pool", type=int, default=1000, help="scenes kept on the device")
    parser.add_argument("--first_scenes", type=int, default=40, help="needed before training begins")
    parser.add_argument("--statistics", type=int, default=64, help="clips that the latents are measured on")
    parser.add_argument("--judged", type=int, default=8, help="held-out scenes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--log_every", type=int, default=50)
    return parser


if __name__ == "__main__":
    train(make_parser().parse_args())
