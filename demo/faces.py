"""Drawn faces, from numbers: the embedded portrait, and the frames that a demo model learns from.

A `Face` says what a face looks like and what it does just now; `draw_face` draws it. An animation is one `Face`
with other values per frame, through `dataclasses.replace`.

Places are in head units: the origin is on the bridge of the nose, x goes right, y goes down, and a face of
`width=1` is about 2 wide. Lists of points are arrays N 2.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Points = np.ndarray
Places = tuple[tuple[float, float], ...]

WHITE, BLACK, GLOSS = (255, 255, 255), (0, 0, 0), (255, 226, 190)
HAIR_STYLES = ("long", "bob", "bun", "short", "curly", "bald")

UNIT = 0.212
"""One head unit, as a share of the picture's side."""
CENTRE = (0.5, 0.475)
PIVOT = (0.0, 1.35)
"""Where the head turns: the top of the neck."""
BODY_FOLLOWS = 0.35
"""Share of the head's offset that the shoulders make too."""
JAW_DROP = 0.13
EYE_SCALE = 1.17
MOUTH_Y = 0.74
CURVE_STEPS = 8
COARSEST_BLUR_PX = 3
"""Soft shapes are drawn smaller, so that their blur has about this radius: as good to look at, and much faster."""


@dataclass(frozen=True)
class Face:
    """What a face looks like (first part) and what it does in one frame (second part)."""

    width: float = 1.0
    length: float = 1.0
    jaw: float = 0.25
    """0 is a pointed chin, 1 a square one."""
    eye_size: float = 1.0
    nose_size: float = 1.0
    lip_size: float = 1.0
    brow_weight: float = 1.0
    hair_style: str = "long"
    skin: Colour = (246, 206, 178)
    hair: Colour = (112, 58, 36)
    iris: Colour = (74, 122, 108)
    lips: Colour = (205, 100, 96)
    clothes: Colour = (44, 110, 122)
    background: tuple[Colour, Colour] = ((255, 214, 170), (112, 166, 188))
    """Top and bottom."""

    eye_openness: float = 1.0
    """0 is shut, 1 awake, a little more surprised."""
    gaze: tuple[float, float] = (0.0, 0.0)
    """Right and down, -1 to 1."""
    brow_raise: float = 0.0
    mouth_opening: float = 0.0
    """0 is closed, 1 wide open."""
    mouth_width: float = 1.0
    mouth_rounding: float = 0.0
    """0 as in "see", 1 as in "who"."""
    smile: float = 0.6
    tilt_degrees: float = 0.0
    """Clockwise."""
    offset: tuple[float, float] = (0.0, 0.0)
    """Of the head, right and down, in head units."""


def draw_face(face: Face, size_px: int, supersample: int = 2) -> Image.Image:
    """An RGB picture of `size_px` squared, drawn `supersample` times larger for smooth edges."""
    canvas = Canvas(size_px * supersample)
    canvas.image.paste(_background(*face.background, canvas.side))
    canvas.move_head(face)
    _back_hair(canvas, face)
    canvas.move_body(face)
    _body(canvas, face)
    canvas.move_head(face)
    _head(canvas, face)
    for side in (-1, 1):
        _eye(canvas, face, side)
        _brow(canvas, face, side)
    _nose(canvas, face)
    _mouth(canvas, face)
    _front_hair(canvas, face)
    return canvas.image.reduce(supersample) if supersample > 1 else canvas.image


# --- points and colours ---------------------------------------------------------------------------------------------


def curve(*points: tuple[float, float], closed: bool = False, steps: int = CURVE_STEPS) -> Points:
    """A smooth line through `points` (Catmull-Rom)."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([p[:1], p, p[-1:]])
    t = _shares(steps, False)[None, :, None]
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    line = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    line = line.reshape(-1, 2)
    return line if closed else np.concatenate([line, p[-1:]])


@lru_cache(maxsize=64)
def _shares(number: int, ends: bool) -> Points:
    return np.linspace(0, 1, number, endpoint=ends)


def oval(x: float, y: float, width: float, height: float | None = None, steps: int = 28) -> Points:
    """An ellipse around a place, from its half axes."""
    angle = 2 * math.pi * _shares(steps, False)
    return np.stack([x + width * np.cos(angle), y + (height or width) * np.sin(angle)], axis=1)


def stroke(line: Points, width: float, start: float = 0.1, end: float = 0.1) -> Points:
    """The outline of a brush stroke along `line`: `width` in the middle, shares of it at its ends."""
    step = np.concatenate([line[1:2] - line[:1], line[2:] - line[:-2], line[-1:] - line[-2:-1]])
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1) / (np.hypot(*step.T)[:, None] + 1e-9)
    t = _shares(len(line), True)[:, None]
    taper = (start + (end - start) * t) + np.sin(np.pi * t) * (1 - (start + end) / 2)
    half = normal * taper * width / 2
    return np.concatenate([line + half, (line - half)[::-1]])


def join(*lines: Points) -> Points:
    return np.concatenate(lines)


def flip(points: Points, side: int = -1) -> Points:
    """Mirrored left to right where `side` is -1."""
    return points * (side, 1)


def moved(points: Points, x: float, y: float) -> Points:
    return points + np.array((x, y))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with a `share` of `second`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def shade(colour: Colour, amount: float) -> Colour:
    """Darker and a little redder, as skin and hair are in shadow."""
    return tuple(round(c * (1 - amount * k)) for c, k in zip(colour, (0.72, 1.0, 1.0), strict=True))


# --- canvas ---------------------------------------------------------------------------------------------------------


class Canvas:
    """A square picture that shapes in head units are painted on."""

    def __init__(self, side: int):
        self.side = side
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)
        self.turn, self.shift = np.eye(2), np.zeros(2)

    def move_head(self, face: Face) -> None:
        angle = math.radians(face.tilt_degrees)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # of row vectors
        pivot = np.array(PIVOT)
        self._move(turn, pivot - pivot @ turn + face.offset)

    def move_body(self, face: Face) -> None:
        self._move(np.eye(2), np.array(face.offset) * BODY_FOLLOWS)

    def _move(self, turn: Points, shift: Points) -> None:
        unit = self.side * UNIT
        self.turn, self.shift = turn * unit, shift * unit + np.array(CENTRE) * self.side

    def pixels(self, points: Points) -> Points:
        return points @ self.turn + self.shift

    def paint(
        self, points: Points, colour: Colour, opacity: float = 1.0, blur: float = 0.0, clip: Points | None = None
    ) -> None:
        """Fill a shape; `blur` softens its edge (head units), and nothing is painted outside of `clip`."""
        shape = self.pixels(points)
        if opacity == 1 and not blur and clip is None:
            self.pen.polygon(shape.ravel().tolist(), fill=colour)
            return
        blur_px = blur * self.side * UNIT
        edge = self.pixels(clip) if clip is not None else None
        box = self._box(shape, 2.5 * blur_px, edge)
        if box is None:
            return
        mask = _soft_mask(shape, box, round(255 * opacity), blur_px)
        if edge is not None:
            mask = ImageChops.multiply(mask, _soft_mask(edge, box, 255, 0))
        self.image.paste(colour, box, mask)

    def _box(self, shape: Points, margin: float, edge: Points | None) -> tuple[int, int, int, int] | None:
        """The pixels that a shape can touch."""
        low, high = shape.min(0) - margin, shape.max(0) + margin
        if edge is not None:
            low, high = np.maximum(low, edge.min(0)), np.minimum(high, edge.max(0))
        left, top = (max(0, math.floor(v)) for v in low)
        right, bottom = (min(self.side, math.ceil(v) + 1) for v in high)
        return (left, top, right, bottom) if left < right and top < bottom else None


def _soft_mask(shape: Points, box: tuple[int, int, int, int], level: int, blur_px: float) -> Image.Image:
    size = (box[2] - box[0], box[3] - box[1])
    shrink = max(1.0, blur_px / COARSEST_BLUR_PX)
    small = tuple(max(1, round(side / shrink)) for side in size)
    mask = Image.new("L", small)
    scale = np.array(small) / size
    ImageDraw.Draw(mask).polygon(((shape - box[:2]) * scale).ravel().tolist(), fill=level)
    if blur_px:
        mask = mask.filter(ImageFilter.GaussianBlur(blur_px / shrink))
    return mask if small == size else mask.resize(size, Image.Resampling.BILINEAR)


@lru_cache(maxsize=8)
def _background(top: Colour, bottom: Colour, side: int) -> Image.Image:
    """Top to bottom, with a glow behind the head."""
    small = (128, 128)
    picture = Image.composite(
        Image.new("RGB", small, bottom), Image.new("RGB", small, top), Image.linear_gradient("L").resize(small)
    )
    glow = ImageChops.invert(Image.radial_gradient("L")).resize(small).point(lambda v: v * 0.55)
    picture.paste(mix(top, WHITE, 0.7), (0, -8), glow)
    return picture.resize((side, side), Image.Resampling.BICUBIC)


# --- parts of the picture -------------------------------------------------------------------------------------------


def face_outline(face: Face) -> Points:
    """From the top of the skull around; the chin follows the mouth."""
    drop = JAW_DROP * face.mouth_opening
    half = (
        (0.0, -1.36, 0.0),
        (0.56, -1.22, 0.0),
        (0.9, -0.82, 0.0),
        (0.98, -0.25, 0.0),
        (0.95, 0.25, 0.0),
        (0.78 + 0.1 * face.jaw, 0.72, 0.4),
        (0.44 + 0.24 * face.jaw, 1.09, 0.9),
        (0.19 + 0.14 * face.jaw, 1.26, 1.0),
        (0.0, 1.29, 1.0),
    )
    right = [(x * face.width, y * face.length + drop * share) for x, y, share in half]
    return curve(*right, *[(-x, y) for x, y in right[-2:0:-1]], closed=True, steps=12)


def _body(canvas: Canvas, face: Face) -> None:
    skin, clothes = face.skin, face.clothes
    half = curve((0.43, 0.8), (0.43, 1.3), (0.52, 1.52), (1.0, 1.72), (2.0, 2.0), (2.2, 3.0))
    neck = join(half, flip(half)[::-1])
    canvas.paint(neck, shade(skin, 0.1))
    under_chin = oval(0.05, 1.22 + 0.1 * face.mouth_opening, 0.62, 0.34)
    canvas.paint(under_chin, shade(skin, 0.42), opacity=0.75, blur=0.1, clip=neck)
    for side in (-1, 1):  # collarbones
        bone = stroke(curve((0.14, 1.86), (0.4, 1.78), (0.85, 1.72)), 0.05)
        canvas.paint(flip(bone, side), shade(skin, 0.3), opacity=0.5, blur=0.03, clip=neck)
    shoulder = curve((0.66, 1.53), (1.15, 1.68), (1.75, 1.86), (2.15, 2.15), (2.4, 3.0))
    collar = curve((-0.66, 1.53), (-0.42, 1.84), (0.0, 1.97), (0.42, 1.84), (0.66, 1.53))
    cloth = join(collar, shoulder, flip(shoulder)[::-1])
    canvas.paint(cloth, clothes)
    canvas.paint(oval(1.75, 2.5, 0.7, 0.75), shade(clothes, 0.4), opacity=0.7, blur=0.3, clip=cloth)
    canvas.paint(oval(-1.0, 1.9, 0.5, 0.2), mix(clothes, WHITE, 0.35), opacity=0.5, blur=0.2, clip=cloth)
    canvas.paint(stroke(moved(collar, 0, 0.06), 0.13, 1, 1), shade(clothes, 0.2), clip=cloth)
    canvas.paint(stroke(moved(collar, 0, 0.1), 0.03, 1, 1), mix(clothes, WHITE, 0.2), opacity=0.7, clip=cloth)
    for side in (-1, 1):
        fold = stroke(curve((1.2, 2.6), (1.26, 2.4), (1.42, 2.2)), 0.05)
        canvas.paint(flip(fold, side), shade(clothes, 0.45), opacity=0.5, blur=0.05)


def _head(canvas: Canvas, face: Face) -> None:
    skin, wide = face.skin, face.width
    for side in (-1, 1):
        ear = flip(oval(0.99 * wide, 0.1, 0.13, 0.25), side)
        canvas.paint(ear, shade(skin, 0.1))
        canvas.paint(flip(oval(1.02 * wide, 0.1, 0.06, 0.15), side), shade(skin, 0.4), opacity=0.6, blur=0.03)
    outline = face_outline(face)
    canvas.paint(outline, skin)
    shadow, light, blush = shade(skin, 0.34), mix(skin, WHITE, 0.55), mix(skin, (232, 92, 86), 0.5)
    drop = JAW_DROP * face.mouth_opening
    rim = join(outline, (outline * 0.86 + (-0.1, 0.0))[::-1])
    canvas.paint(rim, shadow, opacity=0.55, blur=0.12, clip=outline)
    canvas.paint(oval(-0.08, -0.72, 0.5, 0.26), light, opacity=0.4, blur=0.2, clip=outline)
    canvas.paint(oval(-0.02, 1.1 + drop, 0.17, 0.1), light, opacity=0.3, blur=0.08)
    for side in (-1, 1):
        canvas.paint(flip(oval(0.58 * wide, 0.42, 0.22, 0.15), side), blush, opacity=0.45, blur=0.13, clip=outline)
        canvas.paint(flip(oval(0.54 * wide, 0.26, 0.14, 0.06), side), light, opacity=0.35, blur=0.07)
        socket = flip(oval(0.38 * wide, -0.22, 0.24, 0.1), side)
        canvas.paint(socket, shade(skin, 0.28), opacity=0.5, blur=0.08)


def _eye(canvas: Canvas, face: Face, side: int) -> None:
    """One eye; x grows towards the ear."""
    size, skin = EYE_SCALE * face.eye_size, face.skin
    x, y = 0.42 * face.width, -0.04
    inner, outer = (x - 0.215 * size, y + 0.045), (x + 0.225 * size, y - 0.005)
    low = 0.085 * size
    high = -low * 0.75 + (0.145 * size + low * 0.75) * max(0.0, face.eye_openness)

    def lid(height: float, lift: float = 0.0, lean: float = 0.0) -> Points:
        places = ((-0.13 - lean, 0.78), (0.0 - lean, 1.0), (0.13 - lean, 0.8))
        middle = [(x + dx * size, y + 0.01 - height * share - lift) for dx, share in places]
        return flip(curve((inner[0], inner[1] - lift), *middle, (outer[0], outer[1] - lift)), side)

    upper, lower = lid(high, lean=-0.01), lid(-low)
    opening = join(upper, lower[::-1])
    if face.eye_openness > 0.08:
        canvas.paint(opening, mix((250, 248, 246), skin, 0.08))
        look = (side * x + 0.07 * face.gaze[0], y - 0.015 + 0.05 * face.gaze[1])
        _iris(canvas, face, *look, opening)
        shadow = stroke(moved(upper, 0, 0.025), 0.09, 0.6, 0.6)
        canvas.paint(shadow, mix((60, 50, 70), skin, 0.2), opacity=0.35, blur=0.02, clip=opening)
        canvas.paint(oval(look[0] - 0.055 * size, look[1] - 0.05 * size, 0.038 * size), WHITE, clip=opening)
        canvas.paint(oval(look[0] + 0.05 * size, look[1] + 0.055 * size, 0.018 * size), WHITE, 0.8, clip=opening)
        corner = flip(oval(inner[0] + 0.02, inner[1], 0.022, 0.016), side)
        canvas.paint(corner, mix(skin, (214, 110, 110), 0.6), clip=opening)
    lash = mix(mix(face.hair, BLACK, 0.6), (40, 24, 22), 0.4)
    canvas.paint(stroke(lower, 0.016, 0.3, 1), mix(skin, lash, 0.45))
    canvas.paint(stroke(lid(high + 0.012 * size, lean=-0.01), 0.046 * size, 0.35, 0.8), lash)
    rise = 0.06 * min(1.0, face.eye_openness) - 0.02
    tip = flip(curve((outer[0] - 0.04, outer[1] - 0.3 * rise), outer, (outer[0] + 0.05, outer[1] - rise)), side)
    canvas.paint(stroke(tip, 0.03 * size, 1, 0.1), lash)
    crease = lid(0.145 * size * (0.5 + 0.5 * min(1.0, face.eye_openness)), lift=0.062)
    canvas.paint(stroke(crease, 0.022), shade(skin, 0.5), opacity=0.8, blur=0.006)
    bag = flip(curve((inner[0] + 0.03, y + 0.13), (x, y + 0.165), (outer[0] - 0.06, y + 0.12)), side)
    canvas.paint(stroke(bag, 0.022), shade(skin, 0.35), opacity=0.5, blur=0.012)


def _iris(canvas: Canvas, face: Face, x: float, y: float, opening: Points) -> None:
    iris, radius = face.iris, 0.133 * EYE_SCALE * face.eye_size
    canvas.paint(oval(x, y, radius), shade(iris, 0.6), clip=opening)
    canvas.paint(oval(x, y + 0.005, radius * 0.84), iris, clip=opening)
    canvas.paint(
        oval(x, y + radius * 0.45, radius * 0.55, radius * 0.35), mix(iris, (255, 244, 190), 0.6), 0.8, 0.02, opening
    )
    canvas.paint(oval(x, y, radius * 0.48), (22, 16, 20), clip=opening)


def _brow(canvas: Canvas, face: Face, side: int) -> None:
    x, y = 0.42 * face.width, -0.4 - 0.13 * face.brow_raise
    line = curve((x - 0.24, y + 0.015), (x - 0.06, y - 0.035), (x + 0.13, y - 0.025), (x + 0.31, y + 0.075))
    colour = mix(shade(face.hair, 0.35), face.skin, 0.12)
    canvas.paint(flip(stroke(line, 0.08 * face.brow_weight, 0.4, 0.05), side), colour, opacity=0.9, blur=0.008)


def _nose(canvas: Canvas, face: Face) -> None:
    skin, size = face.skin, face.nose_size
    y = 0.38
    shadow, deep, light = shade(skin, 0.3), shade(skin, 0.62), mix(skin, WHITE, 0.6)
    bridge = stroke(curve((0.11, -0.25), (0.085, 0.0), (0.12 * size, 0.28)), 0.09, 0.4, 0.6)
    canvas.paint(bridge, shadow, opacity=0.45, blur=0.05)
    canvas.paint(stroke(curve((-0.02, -0.2), (-0.02, 0.1), (-0.01, 0.3)), 0.08, 0.5, 1), light, opacity=0.4, blur=0.04)
    canvas.paint(oval(0.01, y + 0.05, 0.17 * size, 0.05), shadow, opacity=0.65, blur=0.035)
    canvas.paint(oval(-0.025, y - 0.07, 0.055 * size, 0.045), light, opacity=0.75, blur=0.025)
    for side in (-1, 1):
        nostril = curve((0.035 * size, y + 0.035), (0.085 * size, y + 0.012), (0.125 * size, y + 0.03))
        canvas.paint(flip(stroke(nostril, 0.042, 0.3, 0.3), side), deep, opacity=0.8, blur=0.008)
        wing = curve((0.155 * size, y - 0.07), (0.19 * size, y - 0.01), (0.16 * size, y + 0.04))
        canvas.paint(flip(stroke(wing, 0.026), side), shade(skin, 0.4), opacity=0.5, blur=0.018)


@dataclass(frozen=True)
class MouthShape:
    """Lines of the lips from left to right, the same ends for all."""

    outer_upper: Points
    inner_upper: Points
    inner_lower: Points
    outer_lower: Points
    half_width: float
    top: float
    bottom: float


def mouth_shape(face: Face) -> MouthShape:
    rounding, gap = face.mouth_rounding, 0.4 * face.mouth_opening
    half = 0.33 * face.mouth_width * (1 - 0.45 * rounding) * (1 - 0.08 * face.mouth_opening)
    corner = MOUTH_Y + 0.3 * gap - 0.1 * face.smile
    top, bottom = MOUTH_Y - 0.12 * gap, MOUTH_Y + 0.88 * gap
    thin = 0.085 * face.lip_size * (1 + 0.3 * rounding)
    full = 0.115 * face.lip_size * (1 + 0.2 * rounding)

    def line(*right: tuple[float, float]) -> Points:
        """Points of the right half from the middle out, as shares of the half width."""
        half_line = [(share * half, y) for share, y in right]
        return curve((-half, corner), *[(-x, y) for x, y in half_line[::-1] if x], *half_line, (half, corner), steps=6)

    def towards_corner(y: float, share: float) -> float:
        return corner + (y - corner) * share

    return MouthShape(
        outer_upper=line((0, top - 0.72 * thin), (0.2, top - thin), (0.62, towards_corner(top - 0.8 * thin, 0.82))),
        inner_upper=line((0, top + 0.012), (0.3, top), (0.68, towards_corner(top, 0.8))),
        inner_lower=line((0, bottom), (0.36, towards_corner(bottom, 0.94)), (0.74, towards_corner(bottom, 0.64))),
        outer_lower=line(
            (0, bottom + full), (0.36, towards_corner(bottom + full, 0.94)), (0.74, towards_corner(bottom + full, 0.64))
        ),
        half_width=half,
        top=top,
        bottom=bottom,
    )


def _mouth(canvas: Canvas, face: Face) -> None:
    mouth, lips, skin = mouth_shape(face), face.lips, face.skin
    canvas.paint(
        oval(0, mouth.bottom + 0.2, mouth.half_width * 0.55, 0.045), shade(skin, 0.34), opacity=0.6, blur=0.045
    )
    upper = join(mouth.outer_upper, mouth.inner_upper[::-1])
    lower = join(mouth.inner_lower, mouth.outer_lower[::-1])
    inside = join(mouth.inner_upper, mouth.inner_lower[::-1])
    if face.mouth_opening > 0.02:
        _mouth_inside(canvas, face, mouth, inside)
    canvas.paint(lower, lips)
    canvas.paint(upper, shade(lips, 0.17))
    shine = oval(-0.03, mouth.bottom + 0.052, mouth.half_width * 0.42, 0.022)
    canvas.paint(shine, mix(lips, WHITE, 0.7), opacity=0.6, blur=0.018, clip=lower)
    line = mouth.inner_upper
    for side in (-1, 1):
        canvas.paint(oval(*(line[-1] * (side, 1)), 0.035, 0.026), shade(skin, 0.5), opacity=0.55, blur=0.018)
    if face.mouth_opening <= 0.06:
        canvas.paint(stroke(line, 0.026, 0.5, 0.5), shade(lips, 0.62))


def _mouth_inside(canvas: Canvas, face: Face, mouth: MouthShape, inside: Points) -> None:
    canvas.paint(inside, (86, 24, 30))
    height = (0.36 - 0.2 * face.mouth_rounding) * (mouth.bottom - mouth.top)
    tongue = oval(0, mouth.bottom + 0.02, mouth.half_width * 0.62, height)
    canvas.paint(tongue, (188, 82, 86), clip=inside)
    teeth_y = mouth.top + 0.02 - 0.05 * face.mouth_rounding
    canvas.paint(oval(0, teeth_y, mouth.half_width * 0.74, 0.085), (250, 246, 240), clip=inside)


# --- hair -----------------------------------------------------------------------------------------------------------


def _back_hair(canvas: Canvas, face: Face) -> None:
    dark, wide = shade(face.hair, 0.3), face.width
    if face.hair_style == "long":
        half = curve((0.0, -1.5), (0.8, -1.22), (1.12, -0.6), (1.24, 0.3), (1.5, 0.95), (1.42, 1.5), (1.1, 1.9))
        canvas.paint(join(half, flip(half)[::-1]) * (wide, 1), dark)
    elif face.hair_style == "bob":
        half = curve((0.0, -1.5), (0.8, -1.22), (1.12, -0.6), (1.26, 0.2), (1.28, 0.8), (1.02, 1.06), (0.6, 1.0))
        canvas.paint(join(half, flip(half)[::-1]) * (wide, 1), dark)
    elif face.hair_style == "bun":
        canvas.paint(oval(0.0, -1.75, 0.46, 0.4), face.hair)
        canvas.paint(oval(-0.1, -1.88, 0.22, 0.12), mix(face.hair, WHITE, 0.35), opacity=0.5, blur=0.08)
        canvas.paint(oval(0.0, -0.4, 1.12 * wide, 1.15), dark)
    elif face.hair_style == "curly":
        for x, y, radius in _curls():
            canvas.paint(oval(x * wide, y, radius), dark)


@lru_cache(maxsize=1)
def _curls() -> tuple[tuple[float, float, float], ...]:
    """Circles around the skull from ear to ear: x, y, radius."""
    angles = np.linspace(math.radians(-12), math.radians(192), 15)
    return tuple(
        (1.12 * math.cos(a), -0.5 - 1.05 * math.sin(a), 0.32 + 0.05 * math.sin(7.3 * i)) for i, a in enumerate(angles)
    )


def _front_hair(canvas: Canvas, face: Face) -> None:
    style = {"long": _parted_hair, "bob": _parted_hair, "bun": _tied_hair, "short": _short_hair, "curly": _curly_hair}
    if face.hair_style in style:
        style[face.hair_style](canvas, face)


def _hair_mass(canvas: Canvas, face: Face, shape: Points, fringe: Points) -> None:
    """A body of hair with its shadow on the forehead (along `fringe`) and the light on its top left."""
    hair = face.hair
    canvas.paint(
        stroke(moved(fringe, 0.02, 0.07), 0.13, 0.5, 0.5), shade(face.skin, 0.5), 0.5, 0.05, face_outline(face)
    )
    canvas.paint(shape, hair)
    gloss = stroke(curve((-0.92, -0.85), (-0.55, -1.28), (0.0, -1.42), (0.5, -1.34)) * (face.width, 1), 0.14)
    canvas.paint(gloss, mix(hair, GLOSS, 0.45), opacity=0.7, blur=0.07, clip=shape)
    canvas.paint(oval(1.1 * face.width, -0.6, 0.3, 0.8), shade(hair, 0.4), opacity=0.6, blur=0.15, clip=shape)


def _strands(canvas: Canvas, face: Face, lines: tuple[Points, ...], clip: Points) -> None:
    for number, line in enumerate(lines):
        colour = mix(face.hair, WHITE, 0.16) if number % 3 == 1 else shade(face.hair, 0.3)
        canvas.paint(stroke(line * (face.width, 1), 0.035), colour, opacity=0.65, clip=clip)


def _parted_hair(canvas: Canvas, face: Face) -> None:
    """Parted on one side; long hair falls in waves over the shoulders, a bob ends at the chin."""
    far_side, near_side = _locks(face.hair_style == "long")
    scale, part = (face.width, 1), (-0.36, -1.2)
    far_fringe = curve(part, (0.14, -1.03), (0.56, -0.82), (0.84, -0.48), (0.94, -0.1))
    near_fringe = curve(part, (-0.62, -0.95), (-0.84, -0.6), (-0.94, -0.1))
    near_top, far_top = np.split(
        curve(
            *((-1.18, 0.2), (-1.18, -0.4), (-1.06, -1.0), (-0.78, -1.4), (-0.36, -1.63), (0.12, -1.69)),
            *((0.66, -1.52), (1.04, -1.06), (1.18, -0.4), (1.18, 0.2)),
        ),
        [4 * CURVE_STEPS],
    )
    far = join(far_top, curve(*far_side), far_fringe[::-1]) * scale
    near = join(near_fringe, curve(*near_side), near_top, far_top[:1]) * scale
    _hair_mass(canvas, face, near, near_fringe * scale)
    _hair_mass(canvas, face, far, far_fringe * scale)
    for side in (-1, 1):
        wave = stroke(curve((1.1, 0.55), (1.2, 0.85), (1.24, 1.15)) * (side, 1), 0.2)
        canvas.paint(wave * scale, mix(face.hair, GLOSS, 0.4), 0.5, 0.09, far if side == 1 else near)
    parting = stroke(curve((-0.35, -1.2), (-0.37, -1.4), (-0.35, -1.62)) * scale, 0.045, 1, 0.2)
    canvas.paint(parting, shade(face.hair, 0.5), opacity=0.7, blur=0.02, clip=join(near, far[::-1]))
    _strands(canvas, face, tuple(_fall(far_side, share, part, 1.0) for share in (0.12, 0.3, 0.5, 0.7, 0.88)), far)
    _strands(canvas, face, tuple(_fall(near_side[::-1], share, part, 0.6) for share in (0.15, 0.4, 0.62, 0.85)), near)


def _locks(is_long: bool) -> tuple[Places, Places]:
    """The outlines of the hair beside the face: down outside and up inside on the right, and the reverse."""
    if is_long:
        outside = ((1.18, 0.2), (1.26, 0.5), (1.42, 0.85), (1.44, 1.2), (1.28, 1.52))
        inside = ((0.98, 1.78), (0.86, 1.5), (0.98, 1.1), (0.98, 0.75), (0.86, 0.42), (0.94, -0.1))
    else:
        outside = ((1.18, 0.2), (1.26, 0.5), (1.26, 0.78), (1.12, 0.98), (0.94, 1.04))
        inside = ((0.74, 0.98), (0.9, 0.88), (0.96, 0.66), (0.94, 0.45), (0.9, 0.25), (0.94, -0.1))
    right = outside + inside
    return right, tuple((-x, y) for x, y in right[::-1])


def _fall(side: Places, share: float, part: tuple[float, float], bend: float) -> Points:
    """A strand from the parting down a lock; `share` 0 runs along its outside, 1 along its inside."""
    sign = math.copysign(1, side[0][0])
    places = [
        (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)
        for a, b in zip(side[:5], side[10:5:-1], strict=True)
    ]
    temple = (sign * (1.16 - 0.22 * share), -0.45 + 0.1 * share)
    crown = (part[0] + sign * 0.62 * bend, -1.6 + 0.36 * share + 0.12 * (1 - bend))
    shoulder = (0.5 * (crown[0] + temple[0]) + sign * 0.12, 0.5 * (crown[1] + temple[1]) - 0.08)
    return curve((part[0], part[1] - 0.06 - 0.34 * (1 - share)), crown, shoulder, temple, *places)


def _tied_hair(canvas: Canvas, face: Face) -> None:
    """Combed back from the forehead."""
    scale = (face.width, 1)
    outer = curve((-1.04, 0.05), (-1.12, -0.5), (-0.85, -1.28), (0.0, -1.6), (0.85, -1.28), (1.12, -0.5), (1.04, 0.05))
    inner = curve(
        (1.04, 0.05), (0.92, -0.35), (0.68, -0.85), (0.0, -1.12), (-0.68, -0.85), (-0.92, -0.35), (-1.04, 0.05)
    )
    shape = join(outer, inner) * scale
    _hair_mass(canvas, face, shape, inner * scale)
    lines = tuple(curve((x, y), (0.72 * x, y - 0.35), (0.2 * x, -1.55)) for x, y in _spread(inner, 7))
    _strands(canvas, face, lines, shape)


def _short_hair(canvas: Canvas, face: Face) -> None:
    """Short at the sides, combed over on top."""
    scale = (face.width, 1)
    outer = curve(
        *((-1.0, 0.05), (-1.07, -0.5), (-0.98, -1.1), (-0.55, -1.56), (0.1, -1.68)),
        *((0.75, -1.5), (1.06, -0.95), (1.06, -0.45), (1.0, 0.05)),
    )
    fringe = curve((0.9, -0.55), (0.74, -0.86), (0.3, -0.98), (-0.2, -0.96), (-0.62, -1.06), (-0.88, -0.6))
    temples = curve((1.0, 0.05), (0.93, -0.2), (0.9, -0.55)), curve((-0.88, -0.6), (-0.94, -0.2), (-1.0, 0.05))
    shape = join(outer, temples[0], fringe, temples[1])
    _hair_mass(canvas, face, shape * scale, fringe * scale)
    lines = tuple(curve((x, y), (x - 0.12, y - 0.3), (x - 0.4, -1.5)) for x, y in _spread(fringe, 6))
    _strands(canvas, face, lines, shape * scale)


def _curly_hair(canvas: Canvas, face: Face) -> None:
    scale = (face.width, 1)
    outline = face_outline(face)
    for x, y, radius in _curls():
        inner = oval(0.96 * x * face.width, 0.88 * y - 0.06, 0.82 * radius)
        canvas.paint(moved(inner, 0.02, 0.07), shade(face.skin, 0.45), 0.4, 0.04, outline)
    for x, y, radius in _curls():
        canvas.paint(oval(0.98 * x, 0.92 * y - 0.06, 0.85 * radius) * scale, face.hair)
    for x, y, radius in _curls():
        centre = (0.99 * x - 0.05, 0.94 * y - 0.1)
        ring = stroke(oval(*centre, 0.5 * radius)[14:26], 0.06)
        canvas.paint(ring * scale, mix(face.hair, GLOSS, 0.32), opacity=0.6)


def _spread(line: Points, number: int) -> list[tuple[float, float]]:
    """So many places along a line, without its ends."""
    return [tuple(line[i]) for i in np.linspace(0, len(line) - 1, number + 2).round().astype(int)[1:-1]]
