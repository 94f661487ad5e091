"""Fixtures of the engine's tests: golden folder, tiny networks and a tiny checkpoint in the official layout."""

import contextlib
import importlib.util
import io
import signal
from pathlib import Path

import pytest
import torch

from wan_s2v_core.attach import attached
from wan_s2v_core.bench.random_weights import fill_random
from wan_s2v_core.cli import main
from wan_s2v_core.config import S2VModelConfig
from wan_s2v_core.model.dit import ClipInputs, S2VTransformer

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in background jobs of a shell, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose a lot where other work shares the cores


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
    return tiny_maker.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


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
