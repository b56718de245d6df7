"""The demo world: captioned pictures of coloured shapes on textured backgrounds, each a pure function of (seed, index).

It stands in for LAION wherever no network is: the tiny models are trained on it, the demo's picture server draws it,
and the validation asks whether what a model paints into a hole is what the caption names.

Coordinates are fractions of the side of the picture's central square, so that they survive a resize and a central crop.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

WORLD_VERSION = 1  # to be raised when the same seed and index give another picture or caption

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (208, 32, 38),
    "orange": (244, 140, 20),
    "yellow": (246, 222, 40),
    "green": (36, 158, 60),
    "blue": (38, 82, 214),
    "purple": (128, 44, 160),
    "pink": (248, 140, 190),
    "white": (246, 246, 246),
}
# Muted on purpose: an object's colour never equals its background's.
BACKGROUND_COLORS = {
    "grey": (118, 120, 124),
    "brown": (104, 78, 58),
    "navy": (34, 42, 74),
    "teal": (62, 106, 108),
    "olive": (106, 108, 62),
    "black": (24, 24, 26),
}
TEXTURES = ("plain", "striped", "checkered", "dotted", "grainy", "shaded")
SIDES_PX = (64, 80, 96, 112, 128)
SUPERSAMPLING = 3

_SINGLE_PLACES = {
    "in the center": (0.5, 0.5),
    "on the left": (0.34, 0.5),
    "on the right": (0.66, 0.5),
    "at the top": (0.5, 0.34),
    "at the bottom": (0.5, 0.66),
}
_PAIRED_PLACES = (
    (("on the left", (0.26, 0.5)), ("on the right", (0.74, 0.5))),
    (("at the top", (0.5, 0.26)), ("at the bottom", (0.5, 0.74))),
)


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape.

    Attributes:
        shape: One of ``SHAPES``.
        color: A key of ``COLORS``.
        size: ``"large"`` or ``"small"``.
        place: The words of the caption that say where it is.
        center: (x, y), fractions of the central square.
        radius: Half of its extent, a fraction of the central square's side.
        angle: Rotation in radians.
    """

    shape: str
    color: str
    size: str
    place: str
    center: tuple[float, float]
    radius: float
    angle: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Its bounding box (left, top, right, bottom), fractions of the central square."""
        x, y = self.center
        return (x - self.radius, y - self.radius, x + self.radius, y + self.radius)

    def phrase(self) -> str:
        """Its name in a caption, such as ``a large red circle on the left``."""
        return f"a {self.size} {self.color} {self.shape} {self.place}"


@dataclass(frozen=True)
class Scene:
    """What a picture of the demo world shows."""

    seed: int
    index: int
    width_px: int
    height_px: int
    texture: str
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        """Says what is where: objects, places, texture and colour of the background."""
        things = " and ".join(item.phrase() for item in self.objects)
        return f"{things}, on a {self.texture} {self.background} background"


def philox(*key: object) -> np.random.Generator:
    """A generator that is a pure function of its key, on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def scene_at(seed: int, index: int) -> Scene:
    """The scene number ``index`` of the world ``seed``."""
    rng = philox("scene", seed, index)
    side = int(rng.choice(SIDES_PX))
    longer = int(side * rng.uniform(1.0, 1.3)) if rng.random() < 0.3 else side
    width, height = (longer, side) if rng.random() < 0.5 else (side, longer)
    objects = _pair(rng) if rng.random() < 0.4 else (_single(rng),)
    texture = str(rng.choice(TEXTURES))
    background = str(rng.choice(list(BACKGROUND_COLORS)))
    return Scene(seed, index, width, height, texture, background, objects)


def _single(rng: np.random.Generator) -> SceneObject:
    place = str(rng.choice(list(_SINGLE_PLACES)))
    size = "large" if rng.random() < 0.6 else "small"
    return _object(rng, place, _SINGLE_PLACES[place], size, rng.uniform(0.27, 0.31) if size == "large" else 0)


def _pair(rng: np.random.Generator) -> tuple[SceneObject, SceneObject]:
    first, second = _PAIRED_PLACES[int(rng.integers(2))]
    sizes = ["large" if rng.random() < 0.5 else "small" for _ in range(2)]
    radii = [rng.uniform(0.22, 0.24) if size == "large" else 0 for size in sizes]
    return (
        _object(rng, first[0], first[1], sizes[0], radii[0]),
        _object(rng, second[0], second[1], sizes[1], radii[1]),
    )


def _object(
    rng: np.random.Generator, place: str, center: tuple[float, float], size: str, large_radius: float
) -> SceneObject:
    radius = large_radius or float(rng.uniform(0.18, 0.2))
    jitter = rng.uniform(-0.02, 0.02, size=2)
    return SceneObject(
        shape=str(rng.choice(SHAPES)),
        color=str(rng.choice(list(COLORS))),
        size=size,
        place=place,
        center=(center[0] + float(jitter[0]), center[1] + float(jitter[1])),
        radius=float(radius),
        angle=float(rng.uniform(-0.2, 0.2)),
    )


def draw(scene: Scene) -> Image.Image:
    """Draws a scene.

    Returns:
        An RGB picture of ``scene.width_px`` × ``scene.height_px``.
    """
    rng = philox("pixels", scene.seed, scene.index)
    size = (scene.width_px * SUPERSAMPLING, scene.height_px * SUPERSAMPLING)
    canvas = _background(rng, scene, size)
    pen = ImageDraw.Draw(canvas)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    for item in scene.objects:
        center = (left + item.center[0] * side, top + item.center[1] * side)
        ground = canvas.getpixel((int(center[0]), int(center[1])))
        _draw_shape(pen, item, center, item.radius * side, _jittered(rng, COLORS[item.color], 10), ground)
    picture = canvas.resize((scene.width_px, scene.height_px), Image.Resampling.BOX)
    grain = rng.normal(0, 2.5, size=(scene.height_px, scene.width_px, 3))
    return Image.fromarray(np.clip(np.asarray(picture, dtype=np.float32) + grain, 0, 255).astype(np.uint8))


def _jittered(rng: np.random.Generator, color: tuple[int, int, int], amount: int) -> tuple[int, ...]:
    return tuple(int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in color)


def _background(rng: np.random.Generator, scene: Scene, size: tuple[int, int]) -> Image.Image:
    base = np.array(_jittered(rng, BACKGROUND_COLORS[scene.background], 8), dtype=np.float32)
    x, y = np.meshgrid(np.arange(size[0]) / min(size), np.arange(size[1]) / min(size))
    amount = _texture(rng, scene.texture, x, y)
    pixels = base + amount[..., None] * (34 + 0.18 * base)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _texture(rng: np.random.Generator, texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much lighter each pixel is than the background's colour, about -0.5..1."""
    frequency, phase = rng.uniform(4, 7), rng.uniform(0, 1)
    if texture == "striped":
        along = x if rng.random() < 0.5 else y
        return ((along * frequency + phase) % 1 < 0.5).astype(np.float32)
    if texture == "checkered":
        return (np.floor(x * frequency + phase) + np.floor(y * frequency + phase)) % 2
    if texture == "dotted":
        u, v = (x * frequency + phase) % 1 - 0.5, (y * frequency + phase) % 1 - 0.5
        return (u * u + v * v < 0.09).astype(np.float32)
    if texture == "grainy":
        coarse = Image.fromarray(rng.uniform(-0.5, 1, size=(24, 24)).astype(np.float32))
        return np.asarray(coarse.resize((x.shape[1], x.shape[0]), Image.Resampling.BILINEAR))
    if texture == "shaded":
        angle = rng.uniform(0, 2 * math.pi)
        return (x - 0.5) * math.cos(angle) * 1.6 + (y - 0.5) * math.sin(angle) * 1.6
    return np.zeros_like(x, dtype=np.float32)


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    item: SceneObject,
    center: tuple[float, float],
    radius: float,
    fill: tuple[int, ...],
    ground: object,
) -> None:
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape in ("circle", "ring"):
        pen.ellipse(box, fill=fill)
        if item.shape == "ring":
            inner = radius * 0.5
            pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=ground)  # pyright: ignore[reportArgumentType]  # what getpixel returns is a colour
        return
    points = [(x + radius * px, y + radius * py) for px, py in _polygon(item.shape, item.angle)]
    pen.polygon(points, fill=fill)


def _polygon(shape: str, angle: float) -> list[tuple[float, float]]:
    """The corners of a shape within the unit circle, turned by ``angle`` radians."""
    if shape == "square":
        points = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif shape == "triangle":
        points = [(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    elif shape == "star":
        points = [
            (
                (1.0 if k % 2 == 0 else 0.42) * math.sin(k * math.pi / 5),
                -(1.0 if k % 2 == 0 else 0.42) * math.cos(k * math.pi / 5),
            )
            for k in range(10)
        ]
    else:
        a, b = 0.95, 0.3
        points = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    cos, sin = math.cos(angle), math.sin(angle)
    return [(px * cos - py * sin, px * sin + py * cos) for px, py in points]
