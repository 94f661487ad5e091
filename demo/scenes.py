"""Scenes that a demo model learns from: a drawn face whose mouth follows a voice, and a driving video for it.

A scene is decided by a seed (who it is, how the head sways, when the eyes blink) and a recording (what the mouth
does). Frame k shows the sound between k / fps and (k + 1) / fps.

Drawing is fast because little is drawn: the parts of a look once, each state of mouth and eyes once, and each frame
is put together from those. What comes out is `draw_face` of each frame, but for the rounding of states.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DEMO = Path(__file__).resolve().parent
if str(DEMO) not in sys.path:
    sys.path.append(str(DEMO))

import faces  # noqa: E402
from faces import BODY_FOLLOWS, CENTRE, PIVOT, UNIT, Canvas, Colour, Face, Points  # noqa: E402

VOICE_HZ = 16000

HAIR_COLOURS = {
    "black": (38, 30, 34),
    "brown": (104, 62, 38),
    "blond": (224, 186, 112),
    "red": (168, 72, 36),
    "grey": (150, 148, 152),
}
EYE_COLOURS = {"brown": (98, 62, 38), "blue": (84, 136, 190), "green": (84, 138, 84)}
CLOTHES = {
    "red": (186, 52, 48),
    "blue": (48, 84, 168),
    "green": (56, 128, 76),
    "yellow": (226, 186, 72),
    "white": (228, 228, 226),
    "black": (48, 46, 54),
    "purple": (120, 70, 142),
}
BACKGROUNDS = {
    "light blue": ((206, 228, 244), (132, 176, 210)),
    "orange": ((255, 214, 170), (222, 146, 92)),
    "green": ((206, 230, 196), (118, 164, 120)),
    "pink": ((250, 218, 222), (214, 150, 166)),
    "grey": ((220, 220, 222), (140, 142, 148)),
    "dark blue": ((92, 112, 150), (40, 52, 86)),
}
SKINS = ((250, 216, 192), (246, 206, 178), (228, 180, 144), (196, 142, 104), (148, 98, 70), (112, 74, 54))
STYLE_WORDS = {"long": "long", "bob": "chin-length", "bun": "tied back", "short": "short", "curly": "curly"}

LOUD = 2.8
"""Of a recording's overall RMS: the loudness of a frame that opens the mouth wide. What a speech encoder hears is
normalised by that RMS, so the opening can be read off its input."""
LOUD_PERCENTILE = 97
"""Of a recording's frames: it opens the mouth wide where that is louder still, so that few frames go beyond."""
SILENCE_RMS = 2e-3
"""Recordings quieter than this throughout count as silent."""
WIDEST = 1.0
DARK_HZ, BRIGHT_HZ = 900.0, 2600.0
"""Spectral centroids that round the lips and spread them."""
MOST_ROUNDING = 0.5
BLINK_EVERY_SECONDS = 3.5
BLINK = (0.55, 0.0, 0.15, 0.7)
"""How open the eyes are in the frames of a blink."""
SEAM_Y = 0.25
"""Above it only eyes and brows move, below only the mouth and the chin (head units)."""
OPENING_STEPS, ROUNDING_STEPS, EYE_STEPS, BROW_STEPS = 36, 8, 10, 8


@dataclass(frozen=True)
class Scene:
    """Who is seen, in words too, and what the face does in each frame."""

    face: Face
    prompt: str
    frames: tuple[Face, ...]


# --- what happens ---------------------------------------------------------------------------------------------------


def make_scene(seed: int, samples: np.ndarray, frames: int, start_frame: int = 0, fps: float = 16.0) -> Scene:
    """Someone who speaks a recording.

    Args:
        seed: decides who it is and how the head moves; the same for every stretch of one scene.
        samples: N float at 16 kHz; silence before and after.
        start_frame: of the recording; below 0 where the scene starts earlier.
    """
    face, prompt = make_look(seed)
    openings = mouth_openings(samples, frames, start_frame, fps)
    roundings = mouth_roundings(samples, frames, start_frame, fps)
    return Scene(
        face,
        prompt,
        tuple(
            replace(
                face,
                mouth_opening=float(opening),
                mouth_rounding=float(rounding),
                **_movement(seed, (start_frame + k) / fps, fps),
            )
            for k, (opening, rounding) in enumerate(zip(openings, roundings, strict=True))
        ),
    )


def make_look(seed: int) -> tuple[Face, str]:
    """A face with its mouth closed, and the words for it."""
    rng = np.random.default_rng((seed, 7))

    def pick(choices: dict) -> tuple[str, Colour]:
        name = list(choices)[rng.integers(len(choices))]
        return name, choices[name]

    style = faces.HAIR_STYLES[rng.choice(6, p=(0.22, 0.2, 0.18, 0.22, 0.14, 0.04))]
    (hair, hair_colour), (eyes, iris) = pick(HAIR_COLOURS), pick(EYE_COLOURS)
    (shirt, clothes), (wall, background) = pick(CLOTHES), pick(BACKGROUNDS)
    skin = SKINS[rng.integers(len(SKINS))]
    face = Face(
        width=rng.uniform(0.94, 1.06),
        length=rng.uniform(0.97, 1.04),
        jaw=rng.uniform(0.05, 0.75),
        eye_size=rng.uniform(0.9, 1.1),
        nose_size=rng.uniform(0.85, 1.2),
        lip_size=rng.uniform(0.85, 1.15),
        brow_weight=rng.uniform(0.75, 1.3),
        hair_style=style,
        skin=_varied(skin, rng),
        hair=_varied(hair_colour, rng),
        iris=_varied(iris, rng),
        lips=faces.mix(_varied((205, 92, 92), rng), skin, rng.uniform(0.05, 0.35)),
        clothes=_varied(clothes, rng),
        background=tuple(_varied(colour, rng) for colour in background),
        mouth_width=rng.uniform(0.92, 1.1),
        smile=rng.uniform(0.3, 0.7),
    )
    head = "A bald person with" if style == "bald" else f"A person with {STYLE_WORDS[style]} {hair} hair,"
    prompt = f"{head} {eyes} eyes and a {shirt} shirt talks to the camera, {wall} background."
    return face, prompt


def _varied(colour: Colour, rng: np.random.Generator, amount: float = 7) -> Colour:
    return tuple(int(v) for v in np.clip(np.add(colour, rng.uniform(-amount, amount, 3)), 0, 255))


def envelope(samples: np.ndarray, frames: int, start_frame: int = 0, fps: float = 16.0) -> np.ndarray:
    """T: the linear RMS of every frame's own interval of the sound, silence outside of it."""
    edges = np.round((start_frame + np.arange(frames + 1)) * VOICE_HZ / fps).astype(int)
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    sums = np.diff(power[np.clip(edges, 0, len(samples))])
    return np.sqrt(np.maximum(sums, 0.0) / np.diff(edges))


def loudness(samples: np.ndarray, fps: float = 16.0) -> float:
    """The RMS that opens the mouth wide in this recording."""
    frames = max(1, int(len(samples) / VOICE_HZ * fps))
    peak = np.percentile(envelope(samples, frames, 0, fps), LOUD_PERCENTILE)
    overall = math.sqrt(np.mean(np.square(samples, dtype=np.float64))) if len(samples) else 0.0
    return max(LOUD * overall, peak, SILENCE_RMS)


def mouth_openings(samples: np.ndarray, frames: int, start_frame: int = 0, fps: float = 16.0) -> np.ndarray:
    """T in 0..1: in proportion to the envelope."""
    return WIDEST * np.clip(envelope(samples, frames, start_frame, fps) / loudness(samples, fps), 0, 1)


def mouth_roundings(samples: np.ndarray, frames: int, start_frame: int = 0, fps: float = 16.0) -> np.ndarray:
    """T in 0..1: rounded where the sound is dark, as in "who"; relaxed in silence. Over three frames."""
    step = round(VOICE_HZ / fps)
    first = round((start_frame - 1) * VOICE_HZ / fps)
    sound = np.zeros((frames + 2) * step)
    heard = samples[max(0, first) : max(0, first + len(sound))]
    sound[max(0, -first) :][: len(heard)] = heard
    power = np.abs(np.fft.rfft(sound.reshape(frames + 2, step) * np.hanning(step))) ** 2
    frequency = np.fft.rfftfreq(step, 1 / VOICE_HZ)
    floor = (SILENCE_RMS * step) ** 2
    centroid = (power @ frequency + floor * 1.5 * DARK_HZ) / (power.sum(1) + floor)
    dark = np.clip((BRIGHT_HZ - centroid) / (BRIGHT_HZ - DARK_HZ), 0, 1) * MOST_ROUNDING
    return np.convolve(dark, (0.25, 0.5, 0.25), mode="valid")


def _movement(seed: int, seconds: float, fps: float) -> dict:
    """What head, eyes and brows do at one time, whatever stretch of the scene it is seen in."""
    rng = np.random.default_rng((seed, 11))
    rates, phases = rng.uniform(0.1, 0.35, 5), rng.uniform(0, 2 * np.pi, 5)
    x, y, tilt, brow, look = np.sin(2 * np.pi * rates * seconds + phases)
    size = rng.uniform(0.3, 1.0)
    slot = math.floor(seconds / BLINK_EVERY_SECONDS)
    chance = np.random.default_rng((seed, 13, slot + 1000))
    begin = (slot + chance.uniform(0.05, 0.9)) * BLINK_EVERY_SECONDS
    frame = math.floor((seconds - begin) * fps + 1e-6)
    awake = 0.95 if not 0 <= frame < len(BLINK) else BLINK[frame]
    return {
        "offset": (0.07 * size * x, 0.04 * size * y),
        "tilt_degrees": 2.5 * size * tilt,
        "brow_raise": 0.35 + 0.3 * brow,
        "gaze": (0.35 * round(look), 0.0),
        "eye_openness": awake,
    }


# --- drawing --------------------------------------------------------------------------------------------------------


def draw_scene(scene: Scene, size_px: int = 256, supersample: int = 2) -> np.ndarray:
    """All frames, T H W 3 uint8."""
    look = Look(scene.face, size_px, supersample)
    return np.stack([look.draw(face) for face in scene.frames])


class Window(Canvas):
    """A part of a picture: `side` is the whole picture's, `box` (left, top, right, bottom) the pixels that are kept."""

    def __init__(self, side: int, box: tuple[int, int, int, int], ground: Colour = faces.BLACK):
        super().__init__(1)
        self.side, self.box = side, box
        self.image = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), ground)
        self.pen = ImageDraw.Draw(self.image)

    def _move(self, turn: Points, shift: Points) -> None:
        super()._move(turn, shift)
        self.shift = self.shift - self.box[:2]

    def _box(self, shape: Points, margin: float, edge: Points | None) -> tuple[int, int, int, int] | None:
        """The pixels that a shape can touch, also those outside: a soft edge comes from all of its shape."""
        low, high = shape.min(0) - margin, shape.max(0) + margin
        if edge is not None:
            low, high = np.maximum(low, edge.min(0)), np.minimum(high, edge.max(0))
        left, top = (math.floor(v) for v in low)
        right, bottom = (math.ceil(v) + 1 for v in high)
        is_seen = left < right and top < bottom and left < self.image.width and top < self.image.height
        return (left, top, right, bottom) if is_seen and right > 0 and bottom > 0 else None


@dataclass(frozen=True)
class Layer:
    """A part of the upright, larger picture: RGBa, and where its top left corner is."""

    picture: Image.Image
    corner: tuple[int, int]

    def trimmed(self) -> "Layer | None":
        """Without its empty edges; None where all is empty."""
        box = self.picture.getbbox()
        if box is None:
            return None
        return Layer(self.picture.crop(box), (self.corner[0] + box[0], self.corner[1] + box[1]))

    def place(self, face: Face, picture: Image.Image, supersample: int) -> None:
        """Lay it over an RGBA picture where the head of `face` is."""
        to_layer = placement(face, picture.width, supersample)
        turn, shift = to_layer[:, :2], to_layer[:, 2] - self.corner
        corners = np.array([(x, y) for x in (0, self.picture.width) for y in (0, self.picture.height)])
        reach = (corners - shift) @ np.linalg.inv(turn).T
        left, top = (int(v) for v in np.clip(np.floor(reach.min(0)), 0, picture.size))
        right, bottom = (int(v) for v in np.clip(np.ceil(reach.max(0)), 0, picture.size))
        if left >= right or top >= bottom:
            return
        data = np.column_stack([turn, shift + turn @ (left, top)]).ravel().tolist()
        size = (right - left, bottom - top)
        moved = self.picture.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
        picture.alpha_composite(moved.convert("RGBA"), (left, top))


class Look:
    """Draws frames of one face. Layers are drawn upright and larger; what moves as a whole is moved as a picture."""

    def __init__(self, face: Face, size_px: int, supersample: int):
        self.supersample, self.side = supersample, size_px * supersample
        self.face = replace(face, tilt_degrees=0.0, offset=(0.0, 0.0))
        self.background = faces._background(*face.background, size_px).convert("RGBA")
        margin = self.side // 16  # what sways in from outside of the picture
        self.whole = (-margin, -margin, self.side + margin, self.side + margin)
        width = 1.2 * max(1.0, face.width)
        self.mouth_box, self.eye_box = self._box(-width, SEAM_Y, width, 1.6), self._box(-width, -1.0, width, SEAM_Y)
        self.back_hair = self._layer(lambda canvas: faces._back_hair(canvas, self.face)).trimmed()
        talking = replace(self.face, mouth_opening=0.25)
        self.body = self._layer(lambda canvas: faces._body(canvas, talking)).trimmed()
        self.front_hair = self._layer(lambda canvas: faces._front_hair(canvas, self.face)).picture
        yawning = replace(self.face, mouth_opening=1.0)  # so that the layer reaches as far as any state
        self.head = Layer(self._head(yawning, self.whole), self.whole[:2]).trimmed()
        self.mouth, self.eyes = lru_cache(maxsize=None)(self._mouth), lru_cache(maxsize=None)(self._eyes)

    def draw(self, face: Face) -> np.ndarray:
        """One frame, H W 3."""
        head = self.head.picture.copy()
        mouth = self.mouth(round(face.mouth_opening * OPENING_STEPS), round(face.mouth_rounding * ROUNDING_STEPS))
        eyes = self.eyes(
            round(face.eye_openness * EYE_STEPS), round(face.brow_raise * BROW_STEPS), round(face.gaze[0], 2)
        )
        for state, box in ((mouth, self.mouth_box), (eyes, self.eye_box)):
            head.paste(state, (box[0] - self.head.corner[0], box[1] - self.head.corner[1]))
        picture = self.background.copy()
        body_place = replace(face, tilt_degrees=0.0, offset=tuple(BODY_FOLLOWS * v for v in face.offset))
        for layer, place in (
            (self.back_hair, face),
            (self.body, body_place),
            (Layer(head, self.head.corner), face),
        ):
            if layer:
                layer.place(place, picture, self.supersample)
        return np.asarray(picture)[..., :3]

    def _box(self, left: float, top: float, right: float, bottom: float) -> tuple[int, int, int, int]:
        """Head units -> pixels of the upright head."""
        corners = np.array([[left, top], [right, bottom]]) * UNIT + CENTRE
        return tuple(np.round(corners * self.side).astype(int).ravel().tolist())

    def _layer(self, paint: Callable[[Canvas], None]) -> Layer:
        """What is painted, with its opacity: from how it covers black and white."""
        on_black, on_white = (Window(self.side, self.whole, ground) for ground in (faces.BLACK, faces.WHITE))
        for canvas in (on_black, on_white):
            canvas.move_head(self.face)
            paint(canvas)
        black, white = (np.asarray(canvas.image) for canvas in (on_black, on_white))
        pixels = np.dstack([black, 255 - (white - black)[..., 1]])
        return Layer(Image.frombytes("RGBa", on_black.image.size, pixels.tobytes()), self.whole[:2])

    def _head(self, face: Face, box: tuple[int, int, int, int]) -> Image.Image:
        """Skin, features and the hair in front of them, RGBa; of the features those that `box` shows."""
        canvas = Window(self.side, box, face.skin)
        canvas.move_head(face)
        faces._head(canvas, face)
        if box[1] < self.mouth_box[1]:
            for side in (-1, 1):
                faces._eye(canvas, face, side)
                faces._brow(canvas, face, side)
        faces._nose(canvas, face)
        if box[3] > self.eye_box[3]:
            faces._mouth(canvas, face)
        head = canvas.image.convert("RGBA")
        head.putalpha(_head_mask(canvas, face))
        left, top = self.whole[:2]
        hair = self.front_hair.crop((box[0] - left, box[1] - top, box[2] - left, box[3] - top))
        return Image.alpha_composite(head, hair.convert("RGBA")).convert("RGBa")

    def _mouth(self, opening: int, rounding: int) -> Image.Image:
        states = {"mouth_opening": opening / OPENING_STEPS, "mouth_rounding": rounding / ROUNDING_STEPS}
        return self._head(replace(self.face, **states), self.mouth_box)

    def _eyes(self, openness: int, brow: int, gaze: float) -> Image.Image:
        states = {"eye_openness": openness / EYE_STEPS, "brow_raise": brow / BROW_STEPS, "gaze": (gaze, 0.0)}
        return self._head(replace(self.face, **states), self.eye_box)


def _head_mask(canvas: Canvas, face: Face) -> Image.Image:
    """Where the head covers what is behind it: the skin's outline and the ears."""
    mask = Image.new("L", canvas.image.size)
    pen = ImageDraw.Draw(mask)
    ears = (faces.flip(faces.oval(0.99 * face.width, 0.1, 0.13, 0.25), side) for side in (-1, 1))
    for shape in (faces.face_outline(face), *ears):
        pen.polygon(canvas.pixels(shape).ravel().tolist(), fill=255)
    return mask


def placement(face: Face, size_px: int, supersample: int) -> np.ndarray:
    """Pixels of the picture -> pixels of the upright, larger one: 2 3, a matrix and a shift."""
    angle = math.radians(face.tilt_degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    pivot = (np.array(PIVOT) * UNIT + CENTRE) * size_px
    shift = pivot - turn @ (pivot + np.array(face.offset) * UNIT * size_px)
    return np.column_stack([turn, shift]) * supersample


# --- driving video --------------------------------------------------------------------------------------------------

POSE_SUPERSAMPLE = 2
POSE_COLOURS = {"head": (255, 255, 0), "eyes": (0, 170, 255), "nose": (0, 255, 80), "mouth": (255, 60, 60)}


def draw_pose(scene: Scene, size_px: int = 256) -> np.ndarray:
    """Where head, eyes, nose and mouth are in each frame, as coloured lines on black: T H W 3 uint8."""
    return np.stack([_draw_lines(face, size_px) for face in scene.frames])


def _draw_lines(face: Face, size_px: int) -> np.ndarray:
    canvas = Canvas(size_px * POSE_SUPERSAMPLE)
    canvas.move_head(face)
    thick = max(1, round(canvas.side / 128))

    def line(points: Points, part: str) -> None:
        canvas.pen.line(canvas.pixels(points).ravel().tolist(), fill=POSE_COLOURS[part], width=thick, joint="curve")

    outline = faces.face_outline(face)
    line(faces.join(outline, outline[:2]), "head")
    for side in (-1, 1):
        height = 0.02 + 0.1 * face.eye_size * face.eye_openness
        eye = faces.flip(faces.oval(0.42 * face.width, -0.04, 0.23 * face.eye_size, height), side)
        line(faces.join(eye, eye[:2]), "eyes")
    line(faces.curve((0.0, -0.2), (0.02, 0.1), (0.08, 0.38), (-0.06, 0.42)), "nose")
    mouth = faces.mouth_shape(face)
    line(faces.join(mouth.inner_upper, mouth.inner_lower[::-1], mouth.inner_upper[:1]), "mouth")
    return np.asarray(canvas.image.reduce(POSE_SUPERSAMPLE))
