"""Fixtures of the engine's tests: golden folder, tiny networks and a tiny checkpoint in the official layout."""

import contextlib
import gc
import importlib.util
import io
import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # which torch needs
from pooled_vae import pool

from wan_s2v_core.attach import attached
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.cli import main
from wan_s2v_core.config import S2VModelConfig
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer
from wan_s2v_core.model.vae import VideoVAE

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in background jobs of a shell, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose a lot where other work shares the cores


LONGEST_FIRST = (
    *("test_attack", "test_nothing_lost", "test_interpreted", "test_quality", "test_resume", "test_generate"),
    *("test_recovery", "test_small_cards", "test_fast_vae", "test_faults", "test_bench", "test_noise_experts"),
    *("test_long_voice", "test_assets", "test_gaps", "test_expert_runs"),
)


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no worker is left with one while the others have ended."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else 99)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """What is there before a module's tests, such as all that libraries bring, is nobody's garbage. Runs collect often,
    and looking through all of it takes half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def tiny_maker():
    """The module demo/tiny_checkpoint.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("tiny_checkpoint", ROOT / "demo" / "tiny_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_maker, tmp_path_factory) -> Path:
    """Made once for all workers of pytest-xdist; whoever damages it or puts files beside it takes a copy."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_checkpoint"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            tiny_maker.make_checkpoint(folder.with_suffix(".part")).rename(folder)
    gc.freeze()  # it has brought the large libraries
    return folder


REAL_VAE = VideoVAE.encode, VideoVAE.decode


@pytest.fixture(scope="module")
def pooled_vae():
    """Pooling in place of the VAE's convolutions, in all tests of a module that do not ask for `real_vae`."""
    with pytest.MonkeyPatch.context() as patch:
        pool(patch)
        yield


@pytest.fixture
def real_vae(monkeypatch):
    """Where a module's tests take `pooled_vae`: this one does not."""
    monkeypatch.setattr(VideoVAE, "encode", REAL_VAE[0])
    monkeypatch.setattr(VideoVAE, "decode", REAL_VAE[1])


TINY = S2VModelConfig(
    width=48,
    feed_forward_width=96,
    heads=2,
    blocks=3,
    text_width=32,
    text_tokens=16,
    audio_width=24,
    audio_layers=4,
    injected_blocks=(0, 2),
)


@pytest.fixture
def attach():
    """attach(model, *techniques): until the test ends, or until the function that comes back is called."""
    with contextlib.ExitStack() as whole:

        def until_then(model, *techniques):
            own = whole.enter_context(contextlib.ExitStack())
            own.enter_context(attached(model, techniques))
            return own.close

        yield until_then


@pytest.fixture
def fresh_seed() -> int:
    """A new seed in every run, printed when a test fails."""
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return seed


@pytest.fixture
def make_model(fresh_seed):
    def make(config: S2VModelConfig = TINY) -> S2VTransformer:
        model = S2VTransformer(config)
        fill_random(model, fresh_seed)
        return model

    return make


@pytest.fixture
def make_inputs(fresh_seed):
    """Random inputs of one clip and its noise; latent size h x w."""

    def make(config: S2VModelConfig = TINY, frames=5, h=8, w=12, motion=19, batch=1):
        generator = torch.Generator().manual_seed(fresh_seed)

        def normal(*shape):
            return torch.randn(batch, *shape, generator=generator)

        inputs = ClipInputs(
            reference_latents=normal(16, 1, h, w),
            motion_latents=normal(16, motion, h, w) if motion else None,
            pose_latents=normal(16, frames, h, w),
            audio=normal(config.audio_layers, config.audio_width, 4 * frames),
            text=normal(7, config.text_width),
            motion_frames=73,
        )
        return inputs, normal(16, frames, h, w)

    return make


@pytest.fixture
def run_cli():
    """Run the command line in this process -> exit code, stdout, stderr."""

    def run(*arguments: str | Path, command=main) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = stop.code
        return code, out.getvalue(), err.getvalue()

    return run
