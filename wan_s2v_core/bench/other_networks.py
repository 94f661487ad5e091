"""The networks besides the DiT, and how long each of the four takes to load."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import DEFAULT_NEGATIVE_PROMPT
from ..geometry import LATENT_CHANNELS, PIXELS_PER_LATENT, latent_frames_of
from ..io.audio import SPEECH_HZ
from ..model.checkpoint import DIT, TEXT_ENCODER, VAE
from .cases import ENCODERS, LOAD, VIDEO_VAE, Case, Result
from .engine import BUILDERS, SEED
from .forwards import timing_facts
from .measure import OTHER, SPLIT, Call, PeakMemory, now, profile, time_runs
from .session import Session

PROMPT = "A person talks to the camera in a quiet room, close shot, natural light."
FPS = 16


def measure_network(session: Session, case: Case) -> Result:
    """One call of the VAE or an encoder, median of some."""
    session.drop()
    is_vae = case.network == VAE
    network = session.network(case.network, case.precision)
    given = vae_call(network, case, session.device) if is_vae else encoder_call(network, case)
    timing = time_runs(given, session.request.runs, session.device)
    seen = profile(given, session.device)
    flop = vae_flop(session, case) if is_vae else count_flop(given)
    rate, tflops = session.ceilings.large(products_dtype(network)), flop / timing.median / 1e12
    details = timing_facts(timing) | {
        "flop": {"total": flop},
        "dtype": type_name(network),
        "allowed_seconds": rate and {"total": flop / rate / 1e12},
        "idle_seconds": max(0.0, timing.median - sum(seen.split.values())),
        "kernels": seen.kernels,
    }
    if case.frames:
        details["frames_per_second"] = case.frames / timing.median
    share = rate and tflops / rate
    split = seen.within(timing.median)
    return Result(timing.median, timing.median, timing.peak_bytes, tflops, share, split, details=details)


def products_dtype(network: nn.Module) -> torch.dtype:
    """In what a network computes, which its first weights need not have: see `acceleration.vae.network`."""
    inner = getattr(network, "network", network)
    return getattr(inner, "compute_dtype", None) or next(network.parameters()).dtype


def type_name(network: nn.Module) -> str:
    return str(products_dtype(network)).removeprefix("torch.")


def vae_sizes(case: Case) -> dict[str, tuple[int, ...]]:
    """Shapes of the pixels and the latents of a case."""
    h, w = case.height // PIXELS_PER_LATENT, case.width // PIXELS_PER_LATENT
    pixels = (1, 3, case.frames, case.height, case.width)
    return {"encode": pixels, "decode": (1, LATENT_CHANNELS, latent_frames_of(case.frames), h, w)}


def vae_call(vae: nn.Module, case: Case, device: torch.device) -> Call:
    what = case.name.rpartition(" ")[2]
    generator = torch.Generator(device).manual_seed(SEED)
    given = torch.randn(vae_sizes(case)[what], generator=generator, device=device).clamp(-1, 1)
    code: Callable[[Tensor], Tensor] = getattr(vae, what)
    return lambda: code(given)


def encoder_call(network: nn.Module, case: Case) -> Call:
    """Prompt and negative prompt, or a recording as long as the video."""
    if case.network == TEXT_ENCODER:
        return lambda: [network.encode(prompt) for prompt in (PROMPT, DEFAULT_NEGATIVE_PROMPT)]
    samples = torch.randn(SPEECH_HZ * case.frames // FPS, generator=torch.Generator().manual_seed(SEED))
    return lambda: network.hidden_states(samples)


def vae_flop(session: Session, case: Case) -> float:
    """Counted on the plain network without numbers, since kernels of our own are not seen by the counter."""
    with torch.device("meta"):
        plain = BUILDERS[VAE](session.source.config(VAE))
    return count_flop(vae_call_on_meta(plain, case))


def vae_call_on_meta(vae: nn.Module, case: Case) -> Call:
    what = case.name.rpartition(" ")[2]
    given = torch.empty(vae_sizes(case)[what], device="meta")
    return lambda: getattr(vae, what)(given)


def count_flop(call: Call) -> float:
    """Products and convolutions of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure_load(session: Session, case: Case) -> Result:
    """From files, or from random numbers where there are none, to a network where it computes. Once."""
    session.drop()
    peak, began = PeakMemory(session.device), now(session.device)
    network = session.network(case.network, case.precision)
    seconds = now(session.device) - began
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    details = {
        "from": "files" if session.source.path else "random numbers",
        "bytes": held,
        "gb_per_second": held / seconds / 1e9,
        "spread": 0.0,
    }
    if case.network != DIT:
        details["dtype"] = type_name(network)
    split = dict.fromkeys(SPLIT, 0.0) | {OTHER: seconds}
    return Result(seconds, None, peak.bytes(), None, None, split, details=details)


MEASURES = {VIDEO_VAE: measure_network, ENCODERS: measure_network, LOAD: measure_load}
