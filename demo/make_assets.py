"""Make the portrait and the voice that the pack carries along. The checkpoint is trained: see README.md beside this.

    python demo/make_assets.py [FOLDER] [--only portrait voice]

The voice is spoken by espeak-ng (on Debian and Ubuntu: apt-get install espeak-ng); the portrait needs no program.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
for folder in (ROOT, DEMO):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from faces import Face, draw_face  # noqa: E402

from wan_s2v_core.assets import ASSETS, PORTRAIT, VOICE  # noqa: E402
from wan_s2v_core.io.audio import Recording, read_recording  # noqa: E402
from wan_s2v_core.io.media import import_av  # noqa: E402

PORTRAIT_FACE = Face()
PORTRAIT_PX = 768

TEXT = (
    "Hello! Give me a picture, a voice and a few words. I listen to every sound, and the face in the picture "
    "begins to speak. Now try it with a picture and a voice of your own."
)
SPEAKER = ("-v", "en-us+f3", "-s", "155")
PEAK = 10 ** (-1 / 20)
"""Of full scale: -1 dBFS."""
FADE_SECONDS = 0.01


def make_portrait(path: Path) -> None:
    draw_face(PORTRAIT_FACE, PORTRAIT_PX, supersample=3).save(path, optimize=True)


def speak(text: str) -> Recording:
    """The text, spoken by espeak-ng."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise SystemExit(
            "espeak-ng is not installed, and the voice is spoken by it. "
            "Install it (apt-get install espeak-ng), or leave the voice out: --only portrait"
        )
    with tempfile.TemporaryDirectory() as folder:
        spoken = Path(folder) / "spoken.wav"
        subprocess.run([program, *SPEAKER, "-w", str(spoken), text], check=True)
        return read_recording(spoken)


def level(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """N float -> N int16 with a peak of -1 dBFS, faded in and out so that neither end clicks."""
    fade = round(FADE_SECONDS * rate_hz)
    ramp = np.minimum(1, np.arange(len(samples)) / fade)
    samples = (samples - samples.mean()) * ramp * ramp[::-1]
    return np.round(samples * (PEAK * 32767 / np.abs(samples).max())).astype(np.int16)


def write_flac(path: Path, samples: np.ndarray, rate_hz: int) -> None:
    """Write N int16, one channel."""
    av = import_av()
    with av.open(str(path), "w", format="flac", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=rate_hz, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = rate_hz
        container.mux([*stream.encode(frame), *stream.encode(None)])


def make_voice(path: Path) -> None:
    spoken = speak(TEXT)
    write_flac(path, level(spoken.samples[0].double().numpy(), spoken.rate_hz), spoken.rate_hz)


MAKERS = {"portrait": (PORTRAIT, make_portrait), "voice": (VOICE, make_voice)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ASSETS)
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        file, make = MAKERS[name]
        make(options.folder / file)


if __name__ == "__main__":
    main()
