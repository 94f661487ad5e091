"""Sound files to waveforms, through PyAV; what reading of sound and of pictures shares lives here too.

PyAV is imported inside functions: it is slow to load, and a check of settings needs none of it.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError

log = logging.getLogger(__name__)

SPEECH_HZ = 16000
SHORTEST_SPEECH_SAMPLES = 400
"""What wav2vec 2.0 needs for one feature: 25 ms at 16 kHz."""
RESAMPLER_BLOCK = 1 << 16
LARGEST_SHORTFALL_SECONDS = 0.5
LARGEST_GAIN_DB = 60.0
LEVEL_DBFS = -20.0
"""RMS over all channels that `Recording.levelled` brings a recording to: about what speech is recorded at."""
PEAK_DBFS = -1.0
INTEGER_SCALES = {"s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63}


@dataclass(frozen=True)
class Recording:
    """Sound as it was recorded: samples C N in float32, full scale at -1 and 1."""

    samples: Tensor
    rate_hz: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.rate_hz

    def cut(self, start_seconds: float = 0.0, seconds: float | None = None) -> "Recording":
        """The stretch from `start_seconds` on, `seconds` long or up to the end, whichever comes first.

        Raises:
            ConfigError: if the stretch starts before 0 or behind the end, or is empty.
        """
        check_stretch(start_seconds, seconds)
        start = round(start_seconds * self.rate_hz)
        if start >= self.samples.shape[-1]:
            raise ConfigError(
                f"start_seconds={start_seconds:g} lies at or behind the end of a recording of {self.seconds:.3f} s. "
                "Start earlier, or use a longer recording."
            )
        stop = None if seconds is None else start + max(1, round(seconds * self.rate_hz))
        return Recording(self.samples[:, start:stop], self.rate_hz)

    def amplified(self, gain_db: float) -> "Recording":
        """The same, louder by `gain_db`, or softer below 0. What gets beyond full scale is kept, and logged.

        Raises:
            ConfigError: if the gain is not from -60 to 60 dB.
        """
        if not abs(gain_db) <= LARGEST_GAIN_DB:
            raise ConfigError(
                f"gain_db={gain_db:g} is no usable gain. Use -60 to 60 dB; 0 leaves the sound as it is, 6 doubles it."
            )
        if not gain_db:
            return self
        samples = self.samples * factor(gain_db)
        if beyond := int((samples.abs() > 1).sum()):
            log.warning("%d of %d samples exceed full scale by gain_db=%g", beyond, samples.numel(), gain_db)
        return Recording(samples, self.rate_hz)

    def levelled(self) -> "Recording":
        """The same by one constant gain: RMS at -20 dBFS, or less where the peak would exceed -1 dBFS.

        Plain RMS over all channels and pauses, not loudness as ITU-R BS.1770 weighs it. Silence stays as it is, and
        near silence is raised by 60 dB at most.
        """
        samples = self.samples.double()
        rms, peak = samples.square().mean().sqrt(), samples.abs().amax() if samples.numel() else 0.0
        if not 0 < peak < math.inf:
            return self
        gain = min(float(factor(LEVEL_DBFS) / rms), float(factor(PEAK_DBFS) / peak), factor(LARGEST_GAIN_DB))
        return Recording((samples * gain).float(), self.rate_hz)

    def speech(self, rate_hz: int = SPEECH_HZ) -> Tensor:
        """N: the mean of the channels at `rate_hz`, float32, N rounded to the nearest sample; sample 0 stays first."""
        return resample(self.samples.float().mean(0, keepdim=True), self.rate_hz, rate_hz)[0]


def factor(db: float) -> float:
    """What a gain or level in dB multiplies amplitudes by."""
    return 10 ** (db / 20)


def check_stretch(start_seconds: float, seconds: float | None) -> None:
    """Refuse a stretch that no recording has.

    Raises:
        ConfigError: if it starts before 0, or has no length.
    """
    if not 0 <= start_seconds < math.inf:
        raise ConfigError(
            f"start_seconds={start_seconds:g} is no place in a recording. Use 0 for the start, or a later second."
        )
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(
            f"seconds={seconds:g} is no length of sound. Use more than 0, or leave it out to go on to the end."
        )


def check_recording(recording: Recording) -> None:
    """Refuse a recording that no features can be computed from. Silence is allowed.

    Raises:
        ConfigError: if its rate, shape, length or a sample is not usable.
    """
    samples, rate = recording.samples, recording.rate_hz
    if rate <= 0:
        raise ConfigError(
            f"rate_hz={rate} is no sample rate. It is samples per second, above 0: give the rate of the recording."
        )
    if samples.ndim != 2 or not samples.numel():
        raise ConfigError(
            f"the recording has the shape {tuple(samples.shape)} and so no usable sample. "
            "Channels by samples are expected, at least one of each: use another recording."
        )
    if samples.shape[1] * SPEECH_HZ < SHORTEST_SPEECH_SAMPLES * rate:
        shortest = SHORTEST_SPEECH_SAMPLES / SPEECH_HZ
        raise ConfigError(
            f"the recording is {recording.seconds * 1000:.2f} ms long. wav2vec 2.0 needs {shortest * 1000:.0f} ms: "
            "use a longer recording, or pad it with silence."
        )
    if broken := int((~torch.isfinite(samples)).sum()):
        raise ConfigError(
            f"{broken} of {samples.numel()} samples are infinite or not a number. Samples must be finite, "
            "full scale at -1 and 1: export the recording again, as 16-bit wav for example."
        )


def read_recording(path: str | Path, start_seconds: float = 0.0, seconds: float | None = None) -> Recording:
    """Decode the first audio stream of a sound or video file.

    A stream that starts later than its file begins with silence. A file that breaks off gives what came before,
    and a warning. Only the asked stretch is kept in memory.

    Raises:
        ConfigError: if the file is missing, empty, without sound or not decodable, or the stretch lies outside.
    """
    path = Path(path)
    check_stretch(start_seconds, seconds)
    kept: list[np.ndarray] = []
    dropped = position = rate = 0
    for block, rate in sound_blocks(path):
        position += block.shape[1]
        if not kept and position <= round(start_seconds * rate):
            dropped = position
            continue
        kept.append(block)
        if seconds is not None and position >= (start_seconds + seconds) * rate + 1:
            break
    if not position:
        raise ConfigError(f"{path} holds an audio stream without a sample. Use a file with sound.")
    if not kept:
        raise ConfigError(
            f"start_seconds={start_seconds:g} lies at or behind the end of {path} ({position / rate:.3f} s). "
            "Start earlier, or use a longer recording."
        )
    samples = torch.from_numpy(np.concatenate(kept, axis=1))  # C N
    start = round(start_seconds * rate) - dropped
    stop = None if seconds is None else start + max(1, round(seconds * rate))
    return Recording(samples[:, start:stop].contiguous(), rate)


def resample(samples: Tensor, rate_hz: int, new_rate_hz: int) -> Tensor:
    """C N at `rate_hz` -> C M at `new_rate_hz`, M = round(N * new / old), without delay (swr's windowed sinc)."""
    if rate_hz == new_rate_hz:
        return samples
    length = round(samples.shape[1] * new_rate_hz / rate_hz)
    channels = [_resample_channel(channel, rate_hz, new_rate_hz) for channel in samples.float().cpu().numpy()]
    fitted = [np.pad(channel[:length], (0, max(0, length - len(channel)))) for channel in channels]
    return torch.from_numpy(np.stack(fitted))


def _resample_channel(samples: np.ndarray, rate_hz: int, new_rate_hz: int) -> np.ndarray:
    av = import_av()
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=new_rate_hz)
    pieces = []
    for start in range(0, len(samples), RESAMPLER_BLOCK):
        pieces += resampler.resample(sound_frame(samples[None, start : start + RESAMPLER_BLOCK], rate_hz))
    pieces += resampler.resample(None)
    return np.concatenate([np.zeros(0, np.float32), *(piece.to_ndarray()[0] for piece in pieces)])


def sound_frame(samples: np.ndarray, rate_hz: int) -> Any:
    """C N float32 -> the same as a PyAV frame."""
    interleaved = np.ascontiguousarray(samples.T).reshape(1, -1)  # PyAV takes at most 8 channels one by one
    layout = layout_name(len(samples))
    frame = import_av().AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
    frame.sample_rate = rate_hz
    return frame


def layout_name(channels: int) -> str:
    """FFmpeg's name for so many channels; no places in the room are claimed for more than two."""
    return {1: "mono", 2: "stereo"}.get(channels, f"{channels} channels")


def sound_blocks(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Decode the first audio stream piece by piece: (C N float32, rate in Hz), silence first where it starts late.

    Raises:
        ConfigError: if the file is not usable, or changes its rate or channel count on the way.
    """
    shape = None
    with open_media(path) as container:
        for frame in decoded_frames(container, first_stream(container, "audio", path), path):
            block, rate = _float_samples(frame), frame.sample_rate
            if shape is None:
                shape = (len(block), rate)
                if late := round(_seconds_late(frame, container) * rate):
                    yield np.zeros((len(block), late), np.float32), rate
            elif shape != (len(block), rate):
                raise ConfigError(
                    f"{path} changes from {shape[0]} channels at {shape[1]} Hz to {len(block)} at {rate} Hz. "
                    "One rate and channel count is needed throughout: export it again, as wav for example."
                )
            yield block, rate


def _float_samples(frame: Any) -> np.ndarray:
    """C N float32 of one decoded frame of any sample format."""
    kind = frame.format.name.removesuffix("p")
    if frame.format.is_planar and frame.layout.nb_channels > 8:
        frame = _interleaved(frame, kind)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:  # 1 (N C), channels interleaved
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if kind == "u8":
        return (samples.astype(np.float32) - 128) / 128
    return (samples / INTEGER_SCALES.get(kind, 1.0)).astype(np.float32)


def _interleaved(frame: Any, kind: str) -> Any:
    """The same samples in one plane: PyAV reads beyond the end of more than eight (seen in 14.0 and 18.1)."""
    resampler = import_av().AudioResampler(format=kind, layout=frame.layout, rate=frame.sample_rate)
    (whole,) = resampler.resample(frame)
    return whole


def _seconds_late(frame: Any, container: Any) -> float:
    """How long the file runs before this first frame. Starts below 0 are an encoder's run-in and count as 0."""
    begin = max(0.0, (container.start_time or 0) / 1_000_000)  # AV_TIME_BASE
    return max(0.0, (frame.time or 0.0) - begin)


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        BackendUnavailable: if it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise BackendUnavailable(
            f"package av cannot be imported ({error}). Sound and video files are read and written with it: "
            "install it with 'pip install av'."
        ) from error
    return av


@contextlib.contextmanager
def open_media(path: Path) -> Iterator[Any]:
    """Open a sound or video file for reading.

    Raises:
        ConfigError: if it is missing, empty, not readable or of no known format.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. A sound or video file was expected: name a file inside it.")
    if not path.is_file():
        raise ConfigError(f"{path} is not there. A sound or video file was expected; check the name and the folder.")
    if not path.stat().st_size:
        raise ConfigError(f"{path} is empty (0 bytes). The copy or download may have been cut short: fetch it again.")
    av = import_av()
    try:  # an absolute path cannot be mistaken for an address such as "take:1.wav"
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except av.error.PermissionError as error:
        raise ConfigError(f"{path} may not be read by this user. Change its permissions, or copy it.") from error
    except av.error.FFmpegError as error:
        raise ConfigError(
            f"{path} cannot be opened as sound or video: {error.strerror}. "
            "Use a complete file of a known kind, such as wav, mp3 or mp4."
        ) from error
    with container:
        yield container


def first_stream(container: Any, kind: str, path: Path) -> Any:
    """The first stream of `kind` ("audio" or "video") that can be decoded here.

    Raises:
        ConfigError: if there is none.
    """
    streams = [stream for stream in container.streams if stream.type == kind]
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise ConfigError(f"{path} has no {kind} stream (streams found: {found}). Use a file with one.")
    for stream in streams:
        if stream.codec_context is not None:
            return stream
    raise ConfigError(f"{path} has {kind} of a kind that this PyAV cannot decode. Convert it, to wav or mp4 say.")


def decoded_frames(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Frames of one stream up to its end, or to where the file breaks (logged).

    Packets that cannot be decoded are skipped at the start, where some files carry leftovers of other formats.

    Raises:
        ConfigError: if nothing can be decoded.
    """
    av = import_av()
    stream.thread_type = "AUTO"
    packets, kept, broken = container.demux(stream), 0.0, None
    while True:
        try:  # after an error of its own, `packets` is used up and the next turn ends the loop
            packet = next(packets, None)
            frames = [] if packet is None else packet.decode()
        except av.error.FFmpegError as error:
            broken = error
            if kept:
                log.warning("%s breaks off (%s); the %.2f s before that are used", path, error.strerror, kept)
                return
            continue
        if packet is None:
            break
        for frame in frames:
            kept += _duration(frame, stream)
            yield frame
    if broken and not kept:
        raise ConfigError(
            f"{path} has {stream.type} that cannot be decoded: {broken.strerror}. "
            "The file may be damaged: fetch it again, or convert it."
        )
    announced = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if announced > kept + LARGEST_SHORTFALL_SECONDS:  # a damaged file may just end, without an error
        log.warning(
            "%s announces %.2f s of %s and ends early; the %.2f s it has are used", path, announced, stream.type, kept
        )


def _duration(frame: Any, stream: Any) -> float:
    if stream.type == "audio":
        return frame.samples / frame.sample_rate
    return float(1 / (stream.average_rate or 25))
