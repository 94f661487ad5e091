"""Train the tiny video VAE of the embedded model: the Wan 2.1 VAE with few channels, on drawn faces.

    python demo/train_vae.py --voices .demo/voices_train.npz --out .demo --minutes 8

Writes vae.safetensors (diffusers' names, normalised latents, values that bfloat16 holds), vae.json (losses, PSNR on
long held-out videos and on every tenth of them) and vae.png (originals above, reconstructions below).

A third of the usual work gives no drift: the network looks back in time only where it resamples time, see
`whole_vae.confine_time`. So pictures alone teach nearly everything, and clips of 25 frames teach the rest for videos of
any length. Batches of one shape run as a CUDA graph: the layers are so small that launching them took most of the time.
"""

import argparse
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
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
    BULKY,
    AveragedWeights,
    TimeBox,
    box_mask,
    contact_sheet,
    learning_rate,
    load_weights,
    record_of,
    rounded,
    save_log,
    save_weights,
    spread,
    to_bytes,
    to_video,
)
from whole_vae import WholeVAE, confine_time, fold_statistics, is_confined, time_layers  # noqa: E402

from wan_s2v_core.model.vae import VideoVAE  # noqa: E402

WIDTH = 8
SCENE_FRAMES = 49
CLIP_FRAMES = 25
"""Enough for latent frames that have left the beginning behind (`whole_vae.confine_time`)."""
GRADIENT_WEIGHT = 1.0
KL_WEIGHT = 1e-4
MOVES_WEIGHT = 2.0
"""Of the differences between frames: four of them share a latent frame, and a mouth is not the same in all four."""
MOUTH_JITTER = 0.15
"""How far the middle of a crop around a mouth lies from it, in crops."""
JUMP_SHARE = 0.15
"""Share of the clips whose first frame is another one of the scene: a clip behind a reference picture."""
GREY_SHARE = 0.08
"""Share of the clips that begin with grey frames: the past of a video that starts from its picture."""
POSE_SHARE = 0.1
TINTED_SHARE = 0.5
TINT = 0.15
JUDGED_FRAMES = 153
"""A clip of 80 frames behind 73 motion frames, the most that is ever coded at once."""
TENTHS = 10


@dataclass(frozen=True)
class Stage:
    """What is trained on up to a share of the time: so many clips a step, of so many frames and such a side."""

    until: float
    clips: int
    frames: int
    side_px: int


def make_stages(options: argparse.Namespace) -> list[Stage]:
    """Pictures first, which cost least and teach nearly everything; then clips, cropped and at last whole."""
    area = (options.size // options.crop) ** 2
    pictures, clips = options.shares
    return [
        Stage(pictures, 2 * area * options.batch, 1, options.crop),
        Stage(clips, max(1, area * options.batch // 4), options.clip_frames, options.crop),
        Stage(1.0, max(1, options.batch // 4), options.clip_frames, options.size),
    ]


class ScenePool:
    """The last `size` scenes on the device, so that training never waits for drawings."""

    def __init__(self, size: int, settings: SceneSettings, device: torch.device):
        side = settings.size_px
        self.pixels = torch.empty(size, settings.frames, side, side, 3, dtype=torch.uint8, device=device)
        self.mouths = torch.zeros(size, settings.frames, 4, dtype=torch.int16, device=device)
        self.mouth_centres = np.full((size, 2), side / 2)
        self.size, self.added, self.mouth_share = size, 0, 0.0

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
        if mouths.any():
            self.mouth_centres[place] = mouths.reshape(-1, 2, 2).mean((0, 1))
        self.added += 1

    def sample(self, count: int, frames: int, side_px: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Clips B 3 T H W in [-1, 1] and the mouth's mask B 1 T H W.

        A share of the crops lies around the mouth, the others around the face more often than not. Half of them are
        mirrored, half are tinted. Few calls whatever the count, as small ones wait for those.
        """
        length, whole = self.pixels.shape[1:3]
        scene = rng.integers(len(self), size=count)
        picked = rng.integers(length - frames + 1, size=count)[:, None] + np.arange(frames)
        grey = np.zeros(count, np.int64)
        if frames > 1:
            jumps = rng.random(count) < JUMP_SHARE
            picked[jumps, 0] = rng.integers(length, size=jumps.sum())
            begins_grey = rng.random(count) < GREY_SHARE
            grey[begins_grey] = rng.integers(1, frames - 1, size=begins_grey.sum())
        corner = np.clip(rng.normal(0.5, 0.25, (count, 2)), 0, 1) * (whole - side_px)
        around = self.mouth_centres[scene] + rng.normal(0, MOUTH_JITTER * side_px, (count, 2)) - side_px / 2
        is_mouth = rng.random(count) < self.mouth_share
        corner = np.where(is_mouth[:, None], around, corner).clip(0, whole - side_px).astype(np.int64)
        rows, columns = (corner[:, i, None] + np.arange(side_px) for i in (1, 0))
        mirrored = rng.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
        tint = rng.uniform(-TINT, TINT, (2, count, 3)) * (rng.random(count) < TINTED_SHARE)[:, None]
        scene, picked, rows, columns, grey, tint = (
            torch.from_numpy(value).to(self.pixels.device) for value in (scene, picked, rows, columns, grey, tint)
        )
        rows_of, columns_of = rows[:, None, :, None], columns[:, None, None]
        pixels = self.pixels[scene[:, None, None, None], picked[..., None, None], rows_of, columns_of]
        gain, lift = tint.float()[:, :, None, None, None]  # B 1 1 1 3
        video = ((pixels.float() / 127.5 - 1) * (1 + gain) + lift).clamp(-1, 1)  # B T H W 3
        is_grey = torch.arange(frames, device=grey.device) < grey[:, None]
        video = video.masked_fill(is_grey[..., None, None, None], 0.0).movedim(-1, 1)
        left, top, right, bottom = self.mouths[scene[:, None], picked][..., None].unbind(2)  # B T 1
        high = (rows[:, None] >= top) & (rows[:, None] < bottom)
        wide = (columns[:, None] >= left) & (columns[:, None] < right)
        return video, (high[..., None] & wide[..., None, :]).float()[:, None]


def gradients(video: Tensor) -> tuple[Tensor, Tensor]:
    return video.diff(dim=-1), video.diff(dim=-2)


def vae_loss(
    network: WholeVAE, video: Tensor, mouth: Tensor, precision: torch.dtype, mouth_weight: float = 4.0
) -> dict[str, Tensor]:
    """Losses of one batch; `total` is what is minimised. `mouth_weight`: how much more a pixel of the mouth counts."""
    # Weights are cast anew each time: a CUDA graph must not read copies made before it.
    with torch.autocast(video.device.type, precision, enabled=precision != torch.float32, cache_enabled=False):
        mean, log_variance = (t.float() for t in network.moments(video))
        raw = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        made = network.pixels(raw).float()
    weight = 1 + (mouth_weight - 1) * mouth
    pixel = ((made - video).abs() * weight).mean() / weight.mean()
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(made), gradients(video), strict=True)) / 2
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    total = pixel + GRADIENT_WEIGHT * edges + KL_WEIGHT * divergence
    found = {"pixel": pixel, "edges": edges, "divergence": divergence}
    if video.shape[2] > 1:
        later = weight[:, :, 1:]
        moves = ((made.diff(dim=2) - video.diff(dim=2)).abs() * later).mean() / later.mean()
        found["moves"], total = moves, total + MOVES_WEIGHT * moves
    return {"total": total, **found}


class GradientStep:
    """Losses and gradients of batches of one shape: on a card as a CUDA graph, which costs no time to launch.

    One step at a time: gradients lie where the last captured graph put them, so an earlier one must not run again.
    """

    def __init__(
        self,
        network: WholeVAE,
        batch: tuple[Tensor, Tensor],
        precision: torch.dtype,
        captures: bool,
        mouth_weight: float = 4.0,
    ):
        self.network, self.precision, self.mouth_weight, self.graph = network, precision, mouth_weight, None
        if captures:
            try:
                self._capture(batch)
            except RuntimeError as error:
                self.graph = None
                torch.cuda.synchronize()
                print(f"no CUDA graph, steps are launched one kernel at a time: {error}", flush=True)

    def _run(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        found = vae_loss(self.network, *batch, self.precision, self.mouth_weight)
        self.network.zero_grad(set_to_none=True)
        found["total"].backward()
        return {name: value.detach() for name, value in found.items()}

    def _capture(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = tuple(value.clone() for value in batch)  # clones keep their strides
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are chosen before
            for _ in range(3):
                self._run(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.network.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.found = self._run(self.batch)
        self.graph = graph

    def __call__(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        if self.graph is None:
            return self._run(batch)
        for place, value in zip(self.batch, batch, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.found


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
def judge(weights: dict[str, Tensor], width: int, scenes: list[DrawnScene], device: torch.device, sheet: Path) -> dict:
    """PSNR of long held-out scenes behind the real VideoVAE: of whole pictures, of mouths, and of every tenth of the
    scene, where drift would show; and how the latents are spread."""
    vae = VideoVAE(width)
    vae.network.load_state_dict(weights)
    vae.eval().to(device)
    errors, mouth_errors, latents, rows = [], [], [], []
    for scene in scenes:
        frames = 4 * ((len(scene.pixels) - 1) // 4) + 1
        video = to_video(scene.pixels[:frames], device)
        code = vae.encode(video)
        made = vae.decode(code)
        error = ((made - video) / 2) ** 2
        mask = box_mask(torch.from_numpy(scene.mouths[:frames]).to(device).float(), *video.shape[-2:])
        errors.append(error.mean(dim=(0, 1, 3, 4)))
        mouth_errors.append(((error * mask).sum() / (3 * mask.sum().clamp(min=1))).item())
        latents.append(code.float().std(dim=(0, 2, 3, 4)).mean().item())
        shown = spread(frames, 6)
        rows += [[to_bytes(v[0])[i].numpy() for i in shown] for v in (video, made)]
    contact_sheet(rows[:8], sheet)
    per_frame = torch.stack(errors).mean(dim=0)
    return {
        "psnr": psnr(per_frame.mean()),
        "psnr_per_tenth": [round(psnr(part.mean()), 2) for part in per_frame.tensor_split(min(TENTHS, len(per_frame)))],
        "psnr_per_scene": [round(psnr(value.mean()), 2) for value in errors],
        "mouth_psnr": psnr(np.mean(mouth_errors)),
        "latent_deviation": float(np.mean(latents)),
        "judged_frames": len(per_frame),
    }


def psnr(error: Tensor | float) -> float:
    return -10 * math.log10(max(float(error), 1e-12))


def finish(network: WholeVAE, pool: ScenePool, options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Normalise the latents and round the weights, in place."""
    frames = 4 * ((options.scene_frames - 1) // 4) + 1
    mean, std = latent_statistics(network, pool, options.statistics, rng, frames)
    fold_statistics(network.vae, mean, std)
    network.network.load_state_dict(rounded(network.network.state_dict()))


def make_network(options: argparse.Namespace, device: torch.device) -> WholeVAE:
    vae = VideoVAE(options.width)
    confine_time(vae.network)
    if options.resume:
        weights = load_weights(options.resume)
        if not all(
            is_confined(weights[f"{name}.weight"]) for name in time_layers(vae.network) if "time_conv" not in name
        ):
            raise ValueError(f"{options.resume} looks back in all of its layers. Resume what this trainer has made.")
        vae.network.load_state_dict(weights)
    network = WholeVAE(vae).to(device)
    if device.type == "cuda":
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)
    return network


def train(options: argparse.Namespace) -> dict:
    """Train, normalise, judge and write -> the log."""
    record = record_of(options)  # before anything is written over
    device = torch.device(options.device)
    on_card = device.type == "cuda"
    precision = torch.bfloat16 if on_card else torch.float32
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    settings = SceneSettings(
        str(options.voices),
        options.scene_frames,
        size_px=options.size,
        supersample=options.supersample,
        pose_share=POSE_SHARE,
    )
    network = make_network(options, device)
    feed = SceneFeed(settings, options.workers, options.first_seed)
    average = AveragedWeights(network.network, options.average)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=on_card)
    pool = ScenePool(options.pool, settings, device)
    pool.mouth_share = options.mouth_share
    while len(pool) < options.first_scenes:
        for scene in feed.wait():
            pool.add(scene)
    stages, stage = make_stages(options), None

    def sample(stage: Stage) -> tuple[Tensor, Tensor]:
        return pool.sample(stage.clips, stage.frames, stage.side_px, rng)

    if on_card:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    box, losses, step, told = TimeBox(options.minutes), [], 0, (0, time.monotonic())
    print(f"training with {len(pool)} scenes, {sum(p.numel() for p in parameters)} parameters", flush=True)
    while not box.is_over and step < options.steps:
        for scene in feed.arrived(2):
            pool.add(scene)
        current = next(s for s in stages if box.share < s.until or s is stages[-1])
        if stage is not current:
            stage, told = current, (step, time.monotonic())
            gradients_of = None  # gives the last graph's memory back
            gradients_of = GradientStep(
                network, sample(stage), precision, on_card and options.graphs, options.mouth_weight
            )
            print(f"{step} {box.elapsed:.0f}s {stage}", flush=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.lr, box.share, step, options.warm_up)
        found = gradients_of(sample(stage))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(network.network)
        step += 1
        if step % options.log_every == 0:
            values = {name: round(value.item(), 5) for name, value in found.items()}
            pace, told = (step - told[0]) / (time.monotonic() - told[1]), (step, time.monotonic())
            losses.append({"step": step, "seconds": round(box.elapsed, 1), "frames": stage.frames, **values})
            print(
                f"{step} {box.elapsed:.0f}s {values} lr {optimizer.param_groups[0]['lr']:.2g} {pace:.1f} steps/s, "
                f"{pace * stage.clips * stage.frames:.0f} frames/s of {stage.side_px} px trained, "
                f"{feed.frames_per_second:.0f} frames/s drawn, pool {len(pool)}",
                flush=True,
            )
    trained_seconds = box.elapsed
    feed.close()
    network.network.load_state_dict(average.state())
    finish(network.eval(), pool, options, rng)
    weights = network.network.state_dict()
    save_weights(weights, options.out / "vae.safetensors", {"width": str(options.width), "steps": str(step)})
    log = {
        **record,
        "steps": step,
        "seconds": round(trained_seconds, 1),
        "scenes": feed.scenes,
        "frames_per_second_drawn": feed.frames_per_second,
        "stages": [asdict(stage) for stage in stages],
        "losses": losses,
    }
    save_log(options.out / "vae.json", log)  # what follows takes a while
    held_out = draw_held_out(options, replace(settings, frames=options.judged_frames))
    log = {**judge(weights, options.width, held_out, device, options.out / "vae.png"), **log}
    save_log(options.out / "vae.json", log)
    print({name: value for name, value in log.items() if name not in BULKY}, flush=True)
    return log


def draw_numbered(number: int, settings: SceneSettings) -> DrawnScene:
    from voices import load_voices

    return draw(HELD_OUT_SEED + number, load_voices(Path(settings.voices)), settings)


def draw_held_out(options: argparse.Namespace, settings: SceneSettings) -> list[DrawnScene]:
    """Scenes that are never trained on, of voices that are not either, drawn side by side."""
    settings = replace(settings, voices=str(options.held_out), pose_share=0.0)
    workers = max(1, min(options.workers, options.judged))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as workers:
        return list(workers.map(draw_numbered, range(options.judged), [settings] * options.judged))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voices", type=Path, default=Path(".demo/voices_train.npz"))
    parser.add_argument("--held_out", type=Path, default=Path(".demo/voices_heldout.npz"))
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    parser.add_argument("--minutes", type=float, default=8.0)
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
    parser.add_argument("--batch", type=int, default=8, help="see make_stages")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--mouth_share", type=float, default=0.0, help="share of the crops that lie around the mouth")
    parser.add_argument("--mouth_weight", type=float, default=4.0, help="of a pixel of the mouth in the loss")
    parser.add_argument("--shares", type=float, nargs=2, default=[0.4, 0.75], help="of the time: ends of two stages")
    parser.add_argument("--pool", type=int, default=2000, help="scenes kept on the device, 9.6 MB each")
    parser.add_argument("--first_scenes", type=int, default=40, help="needed before training begins")
    parser.add_argument("--statistics", type=int, default=64, help="clips that the latents are measured on")
    parser.add_argument("--judged", type=int, default=8, help="held-out scenes")
    parser.add_argument("--judged_frames", type=int, default=JUDGED_FRAMES, help="of each")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warm_up", type=int, default=200)
    parser.add_argument("--average", type=float, default=0.999)
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="without CUDA graphs")
    parser.add_argument("--log_every", type=int, default=200)
    return parser


if __name__ == "__main__":
    train(make_parser().parse_args())
