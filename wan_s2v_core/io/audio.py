"""Sound files to waveforms, through PyAV."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, shown, shown_path
from .host_memory import free_ram_bytes
from .media import CURE, best_stream, decoded_frames, import_av, open_media
from .mixing import Mix
from .outside import foreign_parser

log = logging.getLogger(__name__)

SPEECH_HZ = 16000
SHORTEST_SPEECH_SAMPLES = 400
"""What wav2vec 2.0 needs for one feature: 25 ms at 16 kHz."""
RATES_HZ = (4000, 768_000)
"""Lowest and highest sample rate: below there is no speech, above no recorder."""
MOST_CHANNELS = 64
LARGEST_PEAK = 8.0
"""Louder floats are numbers of another scale, such as those of 16-bit samples."""
FAINT_PEAK = 1e-4
"""-80 dBFS: below it nobody speaks."""
LONGEST_SECONDS = 1_000_000.0
"""Of a start or a length that is asked for, eleven days."""
LONGEST_SILENCE_SECONDS = 3600.0
"""That is put where a file says that its sound starts late or pauses."""
SHORTEST_GAP_SECONDS = 0.2
"""A shorter one is a rounded time stamp."""
MEMORY_SHARE = 0.5
"""Of the free host memory, that a recording may take."""
RESAMPLER_BLOCK = 1 << 16
GROWTH_BYTES = 1 << 26
LARGEST_GAIN_DB = 60.0
LEVEL_DBFS = -20.0
"""RMS over all channels that `Recording.levelled` brings a recording to: about what speech is recorded at."""
PEAK_DBFS = -1.0
INTEGER_SCALES = {"s16": 2.0**15, "s32": 2.0**31}


@dataclass(frozen=True)
class Recording:
    """Sound as it was recorded: samples C N in float32, full scale at -1 and 1."""

    samples: Tensor
    rate_hz: int
    channels: tuple[str, ...] = ()
    """FFmpeg's names of the channels (FL, FR, FC, LFE ...), none where they are not known."""

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
        return replace(self, samples=self.samples[:, start:stop])

    def amplified(self, gain_db: float) -> "Recording":
        """The same, louder by `gain_db`, or softer below 0. What gets beyond full scale is logged; a film limits it.

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
            log.warning(
                "%d of %d samples exceed full scale by gain_db=%g and are limited in the video",
                beyond, samples.numel(), gain_db,
            )  # fmt: skip
        return replace(self, samples=samples)

    def levelled(self) -> "Recording":
        """The same by one constant gain: RMS at -20 dBFS, or less where the peak would exceed -1 dBFS.

        Plain RMS over all channels and pauses, not loudness as ITU-R BS.1770 weighs it; of more than two channels it is
        that of their mix. Silence stays as it is, and near silence is raised by 60 dB at most.
        """
        mixed = self.mix.film().double()
        rms = mixed.square().mean().sqrt()
        peak = max(mixed.abs().amax(), self.samples.abs().amax()) if mixed.numel() else 0.0
        if not (0 < peak < math.inf and rms > 0):
            return self
        gain = min(float(factor(LEVEL_DBFS) / rms), float(factor(PEAK_DBFS) / peak), factor(LARGEST_GAIN_DB))
        return replace(self, samples=(self.samples.double() * gain).float())

    @cached_property
    def mix(self) -> Mix:
        """How its channels become those of a film and what the audio encoder hears."""
        return Mix(self.samples.float(), self.channels, self.rate_hz)

    def mixed(self) -> "Recording":
        """The same with two channels at most."""
        return Recording(self.mix.film(), self.rate_hz)

    def speech(self, rate_hz: int = SPEECH_HZ) -> Tensor:
        """N: what is heard in one channel at `rate_hz`, float32, N rounded to the nearest sample; sample 0 stays first.

        The mean of two channels; more are mixed by their places. Where channels cancel each other it is one of them.
        """
        return resample(self.mix.voice()[None], self.rate_hz, rate_hz)[0]


def factor(db: float) -> float:
    """What a gain or level in dB multiplies amplitudes by."""
    return 10 ** (db / 20)


def check_stretch(start_seconds: float, seconds: float | None) -> None:
    """Refuse a stretch that no recording has.

    Raises:
        ConfigError: if it starts before 0, or has no length.
    """
    if not 0 <= start_seconds <= LONGEST_SECONDS:
        raise ConfigError(
            f"start_seconds={shown(f'{start_seconds:g}')} is no place in a recording. Use 0 for the start, or a later "
            f"second, up to {LONGEST_SECONDS:,.0f}."
        )
    if seconds is not None and not 0 < seconds <= LONGEST_SECONDS:
        raise ConfigError(
            f"seconds={shown(f'{seconds:g}')} is no length of sound. Use more than 0, up to {LONGEST_SECONDS:,.0f}, or "
            "leave it out to go on to the end."
        )


def check_rate(rate_hz: int, origin: str) -> None:
    """Raises ConfigError for a sample rate without speech, or that no recorder has."""
    lowest, highest = RATES_HZ
    if not lowest <= rate_hz <= highest:
        raise ConfigError(
            f"{origin} has rate_hz={shown(rate_hz)}, which is no sample rate of speech. From {lowest:,} to {highest:,} "
            "samples per second are read: give the rate of the recording, or convert it."
        )


def check_peak(peak: float, origin: str) -> None:
    """Raises ConfigError for floats of another scale."""
    if peak > LARGEST_PEAK:
        raise ConfigError(
            f"{origin} has a peak of {peak:,.6g}; full scale is 1, and more than {LARGEST_PEAK:g} is no sound in that "
            "scale. Divide it by the largest value of its kind (32768 for 16-bit samples, 2147483648 for 32-bit ones), "
            "or export it as 16-bit wav."
        )


def check_recording(recording: Recording, largest_peak: float = LARGEST_PEAK) -> None:
    """Refuse a recording that no features can be computed from. Silence is allowed.

    Raises:
        ConfigError: if its rate, shape, length, peak or a sample is not usable.
    """
    samples, rate = recording.samples, recording.rate_hz
    check_rate(rate, "the recording")
    if samples.ndim != 2 or not samples.numel() or len(samples) > MOST_CHANNELS:
        raise ConfigError(
            f"the recording has the shape {tuple(samples.shape)} and so no usable sample. "
            f"Channels by samples are expected, 1 to {MOST_CHANNELS} channels and a sample: use another recording."
        )
    if samples.shape[1] * SPEECH_HZ < SHORTEST_SPEECH_SAMPLES * rate:
        shortest = SHORTEST_SPEECH_SAMPLES / SPEECH_HZ
        raise ConfigError(
            f"the recording is {recording.seconds * 1000:.2f} ms long. wav2vec 2.0 needs {shortest * 1000:.0f} ms: "
            "use a longer recording, or pad it with silence."
        )
    if not math.isfinite(peak := peak_of(samples)):
        broken = int((~torch.isfinite(samples)).sum())
        raise ConfigError(
            f"{broken} of {samples.numel()} samples are infinite or not a number. Samples must be finite, "
            "full scale at -1 and 1: export the recording again, as 16-bit wav for example."
        )
    if peak > largest_peak:
        check_peak(peak, "the recording")


def peak_of(samples: Tensor) -> float:
    """The largest sample, without regard to its sign; not a number if one is not."""
    if not samples.numel():
        return 0.0
    return float(torch.maximum(-samples.amin(), samples.amax()))  # aminmax copies what is not contiguous


def as_voice(recording: Recording, origin: str) -> Recording:
    """A recording that came from outside, ready to be heard: within full scale, and what is odd about it logged.

    Raises:
        ConfigError: if its peak says that its samples have another scale.
    """
    samples, peak = recording.samples, peak_of(recording.samples)
    if not math.isfinite(peak):
        return recording  # `check_recording` says how many
    check_peak(peak, origin)
    if peak > 1:
        log.warning("%s exceeds full scale (peak %.3g) and is made softer by %.1f dB", origin, peak, decibels(peak))
        recording = replace(recording, samples=samples / peak)
    if peak < FAINT_PEAK:
        level = f"peak {decibels(peak):.0f} dBFS" if peak else "all samples are 0"
        log.warning("%s is silent (%s): lips will hardly move. Is it the right track?", origin, level)
    elif note := recording.mix.note():
        log.warning("%s: %s", origin, note)
    return recording


def decibels(factor: float) -> float:
    """What multiplies amplitudes by `factor`, in dB."""
    return 20 * math.log10(factor)


def read_recording(path: str | Path, start_seconds: float = 0.0, seconds: float | None = None) -> Recording:
    """Decode the audio stream of a sound or video file that a player would take.

    A stream that starts later than its file begins with silence. A file that breaks off gives what came before,
    and a warning. Only the asked stretch is kept in memory. Sound beyond full scale is made softer.

    Raises:
        ConfigError: if the file is missing, empty, without sound or not decodable, the stretch lies outside, or host
            memory does not hold it.
    """
    path = Path(path)
    name = shown_path(path)
    check_stretch(start_seconds, seconds)
    kept: _Growing | None = None
    dropped, position, rate, names = 0, 0, 0, ()
    for block, rate, names in _named_blocks(path):  # noqa: B007 (the last ones are used below)
        position += block.shape[1]
        if kept is None and position <= round(start_seconds * rate):
            dropped = position
            continue
        kept = kept or _Growing(len(block), name)
        kept.add(block)
        if seconds is not None and position >= (start_seconds + seconds) * rate + 1:
            break
    if not position:
        raise ConfigError(f"{name} holds an audio stream without a sample. Use a file with sound.")
    if kept is None:
        raise ConfigError(
            f"start_seconds={start_seconds:g} lies at or behind the end of {name} ({position / rate:.3f} s). "
            "Start earlier, or use a longer recording."
        )
    start = round(start_seconds * rate) - dropped
    stop = None if seconds is None else start + max(1, round(seconds * rate))
    return as_voice(Recording(kept.samples()[:, start:stop], rate, names), name)


class _Growing:
    """Samples that come block after block, held once: what grows is not copied.

    Raises:
        ConfigError: if they take more than their share of the host memory that was free at the start.
    """

    def __init__(self, channels: int, origin: str):
        self.buffer, self.length, self.origin = np.zeros((0, channels), np.float32), 0, origin
        self.most_bytes = MEMORY_SHARE * free_ram_bytes()

    def add(self, block: np.ndarray) -> None:  # block: C N
        end = self.length + block.shape[1]
        if end > len(self.buffer):
            rows = end + GROWTH_BYTES // (4 * len(block))
            if 4 * rows * len(block) > self.most_bytes + GROWTH_BYTES:
                raise ConfigError(
                    f"{self.origin} takes more than {self.most_bytes / 1e9:.1f} GB of host memory as samples, half of "
                    "what is free. Use a part of it, by its start and its length, or free some memory."
                )
            self.buffer.resize((rows, len(block)), refcheck=False)
        self.buffer[self.length : end] = block.T
        self.length = end

    def samples(self) -> Tensor:
        """C N."""
        return torch.from_numpy(self.buffer[: self.length]).T


def resample(samples: Tensor, rate_hz: int, new_rate_hz: int) -> Tensor:
    """C N at `rate_hz` -> C M at `new_rate_hz`, M = round(N * new / old), without delay (swr's windowed sinc)."""
    if rate_hz == new_rate_hz:
        return samples
    made = np.zeros((len(samples), round(samples.shape[1] * new_rate_hz / rate_hz)), np.float32)
    for channel, out in zip(samples.float().cpu().numpy(), made, strict=True):
        position = 0
        for piece in _resampled(channel, rate_hz, new_rate_hz):
            part = piece[: len(out) - position]
            out[position : position + len(part)] = part
            position += len(part)
    return torch.from_numpy(made)


def _resampled(samples: np.ndarray, rate_hz: int, new_rate_hz: int) -> Iterator[np.ndarray]:
    """N samples of one channel, piece after piece."""
    resampler = import_av().AudioResampler(format="fltp", layout="mono", rate=new_rate_hz)
    for start in range(0, len(samples), RESAMPLER_BLOCK):
        for piece in resampler.resample(sound_frame(samples[None, start : start + RESAMPLER_BLOCK], rate_hz)):
            yield piece.to_ndarray()[0]
    for piece in resampler.resample(None):
        yield piece.to_ndarray()[0]


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
    """Decode the audio stream that a player would take, piece by piece: (C N float32, rate in Hz).

    Silence stands where the stream starts late or pauses. No piece is large.

    Raises:
        ConfigError: if the file is not usable, or changes its rate or channel count on the way.
    """
    for block, rate, _ in _named_blocks(path):
        yield block, rate


def _named_blocks(path: Path) -> Iterator[tuple[np.ndarray, int, tuple[str, ...]]]:
    """The same with the names of the channels."""
    shape, clock = None, _Clock(name := shown_path(path))
    with open_media(path) as container:
        for frame in decoded_frames(container, best_stream(container, "audio", path), path):
            rate = frame.sample_rate
            if shape is None:
                check_rate(rate, name)
            with foreign_parser(path, CURE):
                block, names, time = _float_samples(frame), channel_names(frame), frame.time
            if shape is None:
                shape = (len(block), rate)
                pause = clock.start(time, (container.start_time or 0) / 1_000_000)  # AV_TIME_BASE
            elif shape != (len(block), rate):
                raise ConfigError(
                    f"{name} changes from {shape[0]} channels at {shape[1]} Hz to {len(block)} at {rate} Hz. "
                    "One rate and channel count is needed throughout: export it again, as wav for example."
                )
            else:
                pause = clock.pause(time)
            yield from ((part, rate, names) for part in _silence(len(block), round(pause * rate)))
            clock.reached += block.shape[1] / rate
            yield block, rate, names


class _Clock:
    """Where in a file the decoded sound stands, and what silence its time stamps ask for."""

    def __init__(self, name: str):
        self.name, self.reached, self.filled = name, 0.0, 0.0

    def start(self, time: float | None, file_begin: float) -> float:
        """Seconds that the file runs before the first frame. Starts below 0 are an encoder's run-in and count as 0.

        Raises:
            ConfigError: if these are too many.
        """
        self.reached = time or 0.0
        late = max(0.0, self.reached - max(0.0, file_begin))
        if late > LONGEST_SILENCE_SECONDS:
            raise ConfigError(
                f"the sound of {self.name} starts {late:,.0f} s after its file; up to {LONGEST_SILENCE_SECONDS:,.0f} s "
                "of silence are put before it. Cut the file, or take its sound alone."
            )
        self.filled = late
        return late

    def pause(self, time: float | None) -> float:
        """Seconds of silence before a later frame; jumps that nobody can have recorded are passed over, and logged."""
        gap = 0.0 if time is None else time - self.reached
        if gap < SHORTEST_GAP_SECONDS:
            return 0.0
        begin, self.reached = self.reached, time
        if self.filled + gap > LONGEST_SILENCE_SECONDS:
            log.warning("%s jumps from %.2f s to %.2f s; its sound goes on without a pause", self.name, begin, time)
            return 0.0
        log.warning("%s has no sound from %.2f s to %.2f s; silence stands there", self.name, begin, time)
        self.filled += gap
        return gap


def _silence(channels: int, samples: int) -> Iterator[np.ndarray]:
    """C N of zeros in pieces."""
    for start in range(0, samples, RESAMPLER_BLOCK):
        yield np.zeros((channels, min(RESAMPLER_BLOCK, samples - start)), np.float32)


def channel_names(frame: Any) -> tuple[str, ...]:
    """FFmpeg's names of the channels of a frame, none where it does not know them."""
    names = tuple(channel.name for channel in frame.layout.channels)
    return () if {"NONE", "UNSD", "UNK"} & set(names) else names


def _float_samples(frame: Any) -> np.ndarray:
    """C N float32 of one decoded frame of any sample format."""
    kind, channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    if not 0 < channels <= MOST_CHANNELS:
        raise ValueError(f"{channels} channels were found, 1 to {MOST_CHANNELS} are read")
    if kind == "s64":  # PyAV gives no array of these
        frame, kind = _in_one_plane(frame, "dbl"), "dbl"
    elif frame.format.is_planar and channels > 8:  # it reads beyond the end of more than eight (14.0 and 18.1)
        frame = _in_one_plane(frame, kind)
    samples = frame.to_ndarray()
    if not frame.format.is_planar:  # 1 (N C), channels interleaved
        samples = samples.reshape(-1, channels).T
    if kind == "u8":
        return (samples.astype(np.float32) - 128) / 128
    with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and are refused as such
        return (samples / INTEGER_SCALES.get(kind, 1.0)).astype(np.float32)


def _in_one_plane(frame: Any, kind: str) -> Any:
    """The same samples interleaved, as `kind`."""
    resampler = import_av().AudioResampler(format=kind, layout=frame.layout, rate=frame.sample_rate)
    (whole,) = resampler.resample(frame)
    return whole
