"""Make the voices that a demo model learns from, and load them.

    python demo/voices.py FOLDER [--seed 0]

espeak-ng speaks sentences of our own in many voices (on Debian and Ubuntu: apt-get install espeak-ng); tones, noise
and silence are added. Each file holds all its recordings as companded codes of 7 bits, so that it stays small:
`voices_train.npz`, and `voices_heldout.npz` with speakers and sentences that training never hears.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from wan_s2v_core.io.audio import SPEECH_HZ, read_recording  # noqa: E402

TRAIN, HELDOUT = "voices_train.npz", "voices_heldout.npz"
TRAIN_SPOKEN, TRAIN_SOUNDS, HELDOUT_SPOKEN = 66, 8, 24
TRAIN_SECONDS, HELDOUT_SECONDS = (9.0, 14.0), (10.0, 12.0)

MU = 255.0
LARGEST_CODE = 63
"""Codes run from minus to plus this: 7 bits."""
PEAK = 0.9

HELDOUT_VARIANTS = ("f3", "m4", "Andy")
VARIANTS = (
    *("m1", "m2", "m3", "m5", "m6", "m7", "m8", "f1", "f2", "f4", "f5", "Alex", "Alicia", "Andrea", "Annie", "Denis"),
    *("Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Nguyen", "adam", "anika"),
    *("antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "ed", "edward", "grandma", "grandpa"),
    *("gustave", "iven", "john", "klatt", "klatt2", "klatt4", "linda", "marcelo", "max", "michel", "miguel", "norbert"),
    *("pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro", "shelby", "steph", "travis", "victor", "whisper"),
    *("zac",),
)
ENGLISH = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc", "en-029")
HELDOUT_LANGUAGES = ("en-us", "en-gb-x-rp")

SUBJECTS = (
    *("The old captain", "My little sister", "A stranger in a blue coat", "The baker", "Our neighbour", "Nobody here"),
    *("The youngest pilot", "That quiet boy", "Every good doctor", "The woman next door", "A choir of frogs"),
)
VERBS = (
    *("opens the window", "sings a slow song", "waits for the bus", "paints the kitchen wall", "laughs about the rain"),
    *("carries a box of apples", "wants to know the truth", "looks for a yellow key", "never forgets a name"),
    *("counts the stars", "makes too much noise", "buys fish and bread"),
)
ENDS = (
    *(
        "before breakfast",
        "on the way home",
        "without a word",
        "and goes to sleep",
        "because it is late",
        "every Monday",
    ),
    *("in the middle of the night", "while the kettle boils", "as usual", "for the very first time", "and says hello"),
)
REMARKS = (
    *("Oh, I see!", "Well, what do you think?", "No, no, no. Not today.", "Wait a moment, please.", "How wonderful!"),
    *("Are you sure about that?", "I would rather stay here.", "Two, four, six, eight, ten.", "Ah! There you are."),
    *("Who knows?", "Please speak slowly and clearly.", "Papa made more popcorn.", "We were away for a week."),
    *("She sells small shoes in the street.", "Big black boats blow their horns.", "Five thousand and thirty nine."),
)
HELDOUT_SENTENCES = (
    *(
        "A grey cat sleeps under the piano.",
        "Could you pass me the salt and the pepper?",
        "Tomorrow it may snow again.",
    ),
    *(
        "Those mountains look purple at sunset.",
        "I have lost my umbrella, have you seen it?",
        "Music helps me to think.",
    ),
    *(
        "Seventeen birds sat on the roof of the church.",
        "What a beautiful garden!",
        "The train leaves at half past nine.",
    ),
    *("My uncle builds wooden ships in bottles.", "Let us walk along the river and talk.", "Good morning, everybody!"),
    *(
        "Why did they close the museum?",
        "Honey and warm milk, that is all I need.",
        "He threw the ball over the fence.",
    ),
    *("This road goes up and up, and then down to the sea.",),
)
OTHER_LANGUAGES = {
    "de": (
        "Guten Morgen, wie geht es dir heute?",
        "Der alte Mann geht langsam über die Brücke.",
        "Ach, das ist schön!",
    ),
    "fr-fr": ("Bonjour, comment allez-vous ce matin?", "Le petit chat dort sur la chaise.", "Oh non, il pleut encore!"),
    "es": ("Buenos días, mi querida amiga.", "El perro corre por la playa.", "¿Dónde está la casa de mi abuela?"),
    "it": ("Ciao, come stai oggi?", "La luna è bella sopra il mare.", "Andiamo a mangiare una buona pizza."),
    "pt-br": ("Bom dia, tudo bem com você?", "A menina canta uma canção alegre.", "Vamos tomar um café na praça."),
    "nl": ("Goedemorgen, hoe gaat het met jou?", "De kleine jongen eet een rode appel.", "Wat een mooie dag!"),
    "pl": ("Dzień dobry, jak się masz?", "Mała dziewczynka czyta nową książkę.", "Idziemy dziś do lasu."),
    "fi": ("Hyvää huomenta kaikille.", "Vanha talo seisoo järven rannalla.", "Kuka tulee tänään kylään?"),
    "tr": ("Günaydın, bugün nasılsın?", "Küçük kuş ağaçta şarkı söylüyor.", "Hadi eve gidelim."),
    "sw": ("Habari ya asubuhi, rafiki yangu.", "Mtoto anacheza na mpira.", "Karibu nyumbani kwetu."),
    "ru": ("Доброе утро, как дела?", "Маленькая собака бежит по улице.", "Я очень люблю чай с молоком."),
    "cmn": ("你好，今天天气很好。", "我的朋友喜欢唱歌。", "我们一起去公园吧。"),
    "hi": ("नमस्ते, आप कैसे हैं?", "बच्चा बगीचे में खेलता है।", "मुझे चाय पसंद है।"),
}


@dataclass(frozen=True)
class Speaker:
    """Who speaks, in espeak-ng's terms."""

    voice: str
    words_per_minute: int = 160
    pitch: int = 50

    def say(self, text: str) -> np.ndarray:
        """The text spoken, N float32 at 16 kHz."""
        program = shutil.which("espeak-ng")
        if program is None:
            raise SystemExit("espeak-ng is not installed, and the voices are spoken by it: apt-get install espeak-ng")
        manner = ("-s", str(self.words_per_minute), "-p", str(self.pitch))
        with tempfile.TemporaryDirectory() as folder:
            spoken = Path(folder) / "spoken.wav"
            subprocess.run([program, "-v", self.voice, *manner, "-w", str(spoken), text], check=True)
            return read_recording(spoken).speech().numpy()


# --- what is spoken -------------------------------------------------------------------------------------------------


def english_sentences(rng: np.random.Generator) -> list[str]:
    """All that the parts above make, in random order; every third one a remark."""
    told = [f"{who} {does} {end}." for who, does, end in itertools.product(SUBJECTS, VERBS, ENDS)]
    told = [told[i] for i in rng.permutation(len(told))]
    remarks = [REMARKS[i] for _ in range(len(told) // 2 // len(REMARKS)) for i in rng.permutation(len(REMARKS))]
    return [line for group in zip(told[0::2], told[1::2], remarks, strict=False) for line in group]


def speak_recording(
    speaker: Speaker, sentences: list[str], seconds: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Sentences with pauses and changes of loudness, up to a length between `seconds`; takes from `sentences`."""
    length = round(rng.uniform(*seconds) * SPEECH_HZ)
    pieces, made = [np.zeros(round(rng.uniform(0.05, 0.5) * SPEECH_HZ), np.float32)], 0
    while made < length:
        pieces.append(speaker.say(sentences.pop()) * 10 ** rng.uniform(-0.35, 0.0))
        pieces.append(np.zeros(round(rng.uniform(0.05, 0.7) * SPEECH_HZ), np.float32))
        made = sum(map(len, pieces))
    return finished(np.concatenate(pieces)[:length])


def finished(samples: np.ndarray) -> np.ndarray:
    """At the peak that recordings are stored with, faded out."""
    samples = samples - samples.mean()
    samples *= np.minimum(1, np.arange(len(samples))[::-1] / (0.02 * SPEECH_HZ))
    return (samples * (PEAK / max(1e-6, np.abs(samples).max()))).astype(np.float32)


def training_voices(rng: np.random.Generator) -> list[np.ndarray]:
    english = english_sentences(rng)
    languages = list(OTHER_LANGUAGES)
    made = []
    for number in range(TRAIN_SPOKEN):
        variant = VARIANTS[number % len(VARIANTS)]
        if number % 3 == 2:
            language = languages[number // 3 % len(languages)]
            lines = OTHER_LANGUAGES[language]
            sentences = [lines[i] for _ in range(9) for i in rng.permutation(len(lines))]
        else:
            language, sentences = ENGLISH[number % len(ENGLISH)], english
        speaker = Speaker(f"{language}+{variant}", int(rng.integers(105, 230)), int(rng.integers(15, 86)))
        made.append(speak_recording(speaker, sentences, TRAIN_SECONDS, rng))
    makers = (tones, tones, bursts, near_silence)
    return made + [makers[i % len(makers)](rng) for i in range(TRAIN_SOUNDS)]


def heldout_voices(rng: np.random.Generator) -> list[np.ndarray]:
    made = []
    for number in range(HELDOUT_SPOKEN):
        variant = HELDOUT_VARIANTS[number % len(HELDOUT_VARIANTS)]
        language = HELDOUT_LANGUAGES[number // len(HELDOUT_VARIANTS) % len(HELDOUT_LANGUAGES)]
        sentences = [HELDOUT_SENTENCES[i] for _ in range(2) for i in rng.permutation(len(HELDOUT_SENTENCES))]
        speaker = Speaker(f"{language}+{variant}", int(rng.integers(130, 190)), int(rng.integers(35, 66)))
        made.append(speak_recording(speaker, sentences, HELDOUT_SECONDS, rng))
    return made


# --- what is not spoken ---------------------------------------------------------------------------------------------


def tones(rng: np.random.Generator, seconds: float = 9.0) -> np.ndarray:
    """Notes with a few overtones, one after the other, some held together."""
    samples = np.zeros(round(seconds * SPEECH_HZ), np.float32)
    start = 0
    while start < len(samples) - SPEECH_HZ // 4:
        length = min(len(samples) - start, round(rng.uniform(0.15, 0.9) * SPEECH_HZ))
        time = np.arange(length) / SPEECH_HZ
        pitch = 110 * 2 ** (rng.integers(0, 37) / 12) * (1 + 0.01 * np.sin(2 * np.pi * 5 * time))
        phase = 2 * np.pi * np.cumsum(pitch) / SPEECH_HZ
        note = sum(rng.uniform(0.1, 1) / n * np.sin(n * phase) for n in range(1, 7))
        fade = np.minimum(1, time / 0.02) * np.exp(-rng.uniform(0, 4) * time) * np.minimum(1, (time[-1] - time) / 0.02)
        samples[start : start + length] += (note * fade * rng.uniform(0.2, 1)).astype(np.float32)
        start += round(length * rng.choice((0.5, 1.0, 1.2)))
    return finished(samples)


def bursts(rng: np.random.Generator, seconds: float = 9.0) -> np.ndarray:
    """Noise of many loudnesses and colours."""
    samples = np.zeros(round(seconds * SPEECH_HZ), np.float32)
    start = 0
    while start < len(samples) - SPEECH_HZ // 4:
        length = min(len(samples) - start, round(rng.uniform(0.1, 0.8) * SPEECH_HZ))
        noise = coloured_noise(length, rng.uniform(-2, 0.5), rng)
        hill = np.sin(np.pi * np.arange(length) / length) ** rng.uniform(0.3, 1.5)
        samples[start : start + length] = noise * hill * rng.uniform(0.05, 0.6)
        start += length + round(rng.uniform(0, 0.4) * SPEECH_HZ)
    return finished(samples)


def near_silence(rng: np.random.Generator, seconds: float = 8.0) -> np.ndarray:
    """Silence with a few taps: what a recording has between its words."""
    samples = np.zeros(round(seconds * SPEECH_HZ), np.float32)
    for place in rng.integers(0, len(samples) - 1600, 6):
        samples[place : place + 1600] += coloured_noise(1600, -1, rng) * np.exp(-np.arange(1600) / 300)
    return finished(samples)


def coloured_noise(length: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude goes with frequency to the power of `slope` / 2, unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / SPEECH_HZ), 50)
    noise = np.fft.irfft(spectrum * frequency ** (slope / 2), length)
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


# --- sounding otherwise ---------------------------------------------------------------------------------------------


def augment(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same recording as another speaker, room and microphone would give it: N float32 -> N float32, below 1.

    What a mouth should follow is the sound that comes out: take its envelope afterwards.
    """
    samples = np.asarray(samples, np.float32)
    peak = np.abs(samples).max()
    if peak == 0:
        return samples.copy()
    samples = _other_speed(samples, rng) if rng.random() < 0.7 else samples
    samples = samples * _slow_gain(len(samples), rng)
    samples = _other_sound(samples, rng)
    if rng.random() < 0.7:
        noise = coloured_noise(len(samples), rng.uniform(-2, 0.3), rng)
        samples = samples + noise * samples.std() * 10 ** (-rng.uniform(12, 45) / 20)
    loudness = 10 ** rng.uniform(-1.3, -0.03)
    return (samples * (loudness / (np.abs(samples).max() + 1e-9))).astype(np.float32)


def _other_speed(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Played faster or slower, so pitch and formants change too; begins anew where it ends early."""
    places = np.arange(len(samples)) * 2 ** rng.uniform(-0.3, 0.3) + rng.uniform(0, len(samples))
    return np.interp(places, np.arange(len(samples)), samples, period=len(samples)).astype(np.float32)


def _slow_gain(length: int, rng: np.random.Generator) -> np.ndarray:
    """Louder and quieter over seconds, with a few pauses."""
    places = np.linspace(0, length, 2 + length // SPEECH_HZ)
    gain = 10 ** (rng.uniform(-0.4, 0.0, len(places)))
    curve = np.interp(np.arange(length), places, gain)
    for _ in range(rng.integers(0, 3)):
        start, pause = rng.integers(0, length), round(rng.uniform(0.1, 1.2) * SPEECH_HZ)
        curve[start : start + pause] *= rng.choice((0.0, 0.03))
    return curve.astype(np.float32)


def _other_sound(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Through another microphone (a tilt and a few bumps of the spectrum) and room (a short tail)."""
    length = len(samples)
    frequency = np.maximum(np.fft.rfftfreq(2 * length, 1 / SPEECH_HZ), 40)
    octaves = np.log2(frequency / 1000)
    decibels = rng.uniform(-4, 3) * octaves
    for _ in range(3):
        decibels += rng.uniform(-8, 8) * np.exp(-(((octaves - rng.uniform(-3, 3)) / rng.uniform(0.3, 1.2)) ** 2))
    response = 10 ** (decibels / 20) * (frequency > rng.choice((40, 80, 200)))
    if rng.random() < 0.5:
        time = np.arange(SPEECH_HZ // 2) / SPEECH_HZ
        tail = rng.standard_normal(len(time)) * np.exp(-time * 6.9 / rng.uniform(0.05, 0.4))
        room = np.fft.rfft(tail / np.sqrt((tail**2).sum()), 2 * length)
        response = response * (1 + rng.uniform(0.05, 0.5) * room)
    return np.fft.irfft(np.fft.rfft(samples, 2 * length) * response, 2 * length)[:length].astype(np.float32)


# --- files ----------------------------------------------------------------------------------------------------------


def compand(samples: np.ndarray) -> np.ndarray:
    """N float in [-1, 1] -> N int8 codes: mu-law, so that quiet sound keeps its detail. Zero stays zero."""
    levels = np.sign(samples) * np.log1p(MU * np.abs(samples)) / np.log1p(MU)
    return np.round(levels * LARGEST_CODE).astype(np.int8)


def expand(codes: np.ndarray) -> np.ndarray:
    """The reverse of `compand`, N float32."""
    levels = codes.astype(np.float32) / LARGEST_CODE
    return (np.sign(levels) * np.expm1(np.abs(levels) * np.log1p(MU)) / MU).astype(np.float32)


def save_voices(path: Path, voices: list[np.ndarray]) -> None:
    codes = np.concatenate([compand(samples) for samples in voices])
    np.savez_compressed(path, codes=codes, lengths=np.array([len(samples) for samples in voices]))


def load_voices(path: Path) -> list[np.ndarray]:
    """All recordings of a file, N float32 at 16 kHz each, 8 to 15 s."""
    with np.load(path, allow_pickle=False) as file:
        codes, lengths = file["codes"], file["lengths"]
    return [expand(part) for part in np.split(codes, np.cumsum(lengths)[:-1])]


def make_voices(folder: Path, seed: int = 0) -> None:
    """Write both files into `folder`; the same bytes for the same seed and release of espeak-ng."""
    folder.mkdir(parents=True, exist_ok=True)
    save_voices(folder / TRAIN, training_voices(np.random.default_rng((seed, 0))))
    save_voices(folder / HELDOUT, heldout_voices(np.random.default_rng((seed, 1))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_voices(options.folder, options.seed)
    for name in (TRAIN, HELDOUT):
        voices = load_voices(options.folder / name)
        minutes = sum(map(len, voices)) / SPEECH_HZ / 60
        size = (options.folder / name).stat().st_size
        print(f"{name}: {len(voices)} recordings, {minutes:.1f} minutes, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
