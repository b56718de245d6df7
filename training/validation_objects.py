"""Prompt-following in the demo world: one whole object is hidden, and a judge names what the model painted instead.

Only there is the truth known: a picture's URL names the scene that it was drawn from. The test is made twice, with the
true caption and with another picture's caption whose object differs. A model that reads its caption paints the true
object in the first case and the other picture's in the second; one that guesses from the surroundings cannot do both.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import numpy as np

from infra.errors import ContractError
from model.randomness import stream
from model.tiny.world import COLORS, SHAPES, Scene, SceneObject, scene_at
from training.heldout import HeldOutPicture
from training.inpainting import Inpainter, mean_fill, telea_fill

LOGGER = logging.getLogger(__name__)

CHANCE: Final = 1 / (len(COLORS) * len(SHAPES))
_DEMO_PATH: Final = re.compile(r"/(\d{1,18})/(\d{6,9})\.(?:jpg|png|webp)", re.ASCII)
_GROW_PX_PER_SIDE: Final = 2 / 64
Box = tuple[float, float, float, float]


class Classifier(Protocol):
    """`model.tiny.judge.Judge`, or anything like it."""

    def classify(self, crops: np.ndarray) -> tuple[list[str], list[str]]:
        """Names the colour and the shape in each crop."""
        ...


CropObject = Callable[[np.ndarray, Box], np.ndarray]


@dataclass(frozen=True)
class HiddenObject:
    """A picture, the object that is hidden in it, and the caption of another picture.

    Attributes:
        picture: The held-out picture.
        item: What is hidden.
        other_caption: Another picture's caption.
        other_item: The object that this caption names for the hole.
    """

    picture: HeldOutPicture
    item: SceneObject
    other_caption: str
    other_item: SceneObject


@dataclass(frozen=True)
class ObjectTest:
    """What came out of it: figures, and the pictures that they were taken from.

    Attributes:
        report: JSON values, see `run_object_test`.
        hidden: What was hidden.
        masks: (n, side, side).
        images: Condition → (n, side, side, 3) uint8.
        verdicts: Condition → what the judge saw, such as ``red ring``.
    """

    report: dict[str, Any]
    hidden: list[HiddenObject]
    masks: np.ndarray
    images: dict[str, np.ndarray]
    verdicts: dict[str, list[str]]


def demo_scene_of(url: str) -> Scene | None:
    """The scene that a demo picture's URL names, ``http://any.host/{seed}/{index:06d}.jpg``; None for any other URL."""
    match = _DEMO_PATH.fullmatch(urlsplit(url).path)
    return None if match is None else scene_at(int(match[1]), int(match[2]))


def is_demo_row(url: str, caption: str) -> bool:
    """Whether a row is a picture of the demo world under its own caption."""
    scene = demo_scene_of(url)
    return scene is not None and scene.caption == caption


def hide_objects(pictures: Sequence[HeldOutPicture], seed: int) -> list[HiddenObject]:
    """Chooses one object in each picture, and another picture's caption to go with it.

    The other caption is, among the rows that follow, the first whose scene has the same number of objects and one at
    the same place, of another colour and another shape; else the first that has any such object. Pictures for which
    there is none are left out.

    Args:
        pictures: Rows for which `is_demo_row` holds.
        seed: Of the choice.
    """
    scenes = [_scene_of(picture) for picture in pictures]
    chosen = [
        scene.objects[stream("hidden object", seed, picture.uid).integers(len(scene.objects))]
        for picture, scene in zip(pictures, scenes, strict=True)
    ]
    hidden = []
    for index, (picture, item) in enumerate(zip(pictures, chosen, strict=True)):
        others = [*range(index + 1, len(pictures)), *range(index)]
        candidates = [
            (other, thing)
            for other in others
            for thing in scenes[other].objects
            if thing.color != item.color and thing.shape != item.shape
        ]
        alike = [
            (other, thing)
            for other, thing in candidates
            if thing.place == item.place and len(scenes[other].objects) == len(scenes[index].objects)
        ]
        if candidates:
            other, thing = (alike or candidates)[0]
            hidden.append(HiddenObject(picture, item, pictures[other].caption, thing))
    return hidden


def object_mask(box: Box, side_px: int) -> np.ndarray:
    """A mask that hides a box, with a margin of 2 px at 64 px.

    Args:
        box: Left, top, right, bottom as fractions of the square.
        side_px: Side of the square.

    Returns:
        (side, side) uint8, {0, 1}.
    """
    grow = max(2.0, _GROW_PX_PER_SIDE * side_px)
    left, top = (max(0, int(np.floor(edge * side_px - grow))) for edge in box[:2])
    right, bottom = (min(side_px, int(np.ceil(edge * side_px + grow))) for edge in box[2:])
    mask = np.zeros((side_px, side_px), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def run_object_test(
    inpainter: Inpainter, hidden: Sequence[HiddenObject], judge: Classifier, crop: CropObject
) -> ObjectTest:
    """Hides, repaints and judges.

    The report has ``num_samples``, ``chance``, and ``conditions``: for each of original, model, shuffled, mean_fill and
    telea the shares ``color_agreement``, ``shape_agreement`` and ``object_agreement`` (both) with the object that was
    there; and, as ``shuffled_given``, those of the shuffled pictures with the object that the caption they were given
    names. ``original`` is the judge's own accuracy. All but the last also have two mean cosines, by the text encoder's
    own image tower: ``image_text_similarity`` of the whole picture with its caption, and ``hole_text_similarity`` of
    the square around the hole with the caption of that square alone; not where the text encoder lacks that tower.

    Args:
        inpainter: The model.
        hidden: What to hide.
        judge: Names objects.
        crop: Cuts an object's box out of a picture, as the judge wants it.
    """
    images = np.stack([one.picture.image for one in hidden])
    masks = np.stack([object_mask(one.item.box, images.shape[1]) for one in hidden])
    uids = [one.picture.uid for one in hidden]
    made = {
        "original": images,
        "model": inpainter.repaint(images, masks, [one.picture.caption for one in hidden], uids, "object").composited,
        "shuffled": inpainter.repaint(images, masks, [one.other_caption for one in hidden], uids, "object").composited,
        "mean_fill": mean_fill(images, masks),
        "telea": telea_fill(images, masks),
    }
    seen = {
        name: judge.classify(np.stack([crop(image, one.item.box) for image, one in zip(pictures, hidden, strict=True)]))
        for name, pictures in made.items()
    }
    true_items, given_items = [one.item for one in hidden], [one.other_item for one in hidden]
    similarities = {name: _similarities(inpainter, pictures, masks, hidden) for name, pictures in made.items()}
    conditions = {name: _agreement(verdict, true_items) | similarities[name] for name, verdict in seen.items()}
    conditions["shuffled_given"] = _agreement(seen["shuffled"], given_items)
    report = {"num_samples": len(hidden), "chance": CHANCE, "conditions": conditions}
    verdicts = {
        name: [f"{color} {shape}" for color, shape in zip(*verdict, strict=True)] for name, verdict in seen.items()
    }
    return ObjectTest(report, list(hidden), masks, made, verdicts)


def _agreement(verdict: tuple[list[str], list[str]], items: Sequence[SceneObject]) -> dict[str, float]:
    colors, shapes = verdict
    is_color = np.array([color == item.color for color, item in zip(colors, items, strict=True)])
    is_shape = np.array([shape == item.shape for shape, item in zip(shapes, items, strict=True)])
    return {
        "color_agreement": float(is_color.mean()),
        "shape_agreement": float(is_shape.mean()),
        "object_agreement": float((is_color & is_shape).mean()),
    }


def _similarities(
    inpainter: Inpainter, images: np.ndarray, masks: np.ndarray, hidden: Sequence[HiddenObject]
) -> dict[str, float]:
    captions = [one.picture.caption for one in hidden]
    if not inpainter.text.compares:
        return {}
    of_pictures = inpainter.image_text_similarity(images, np.ones_like(masks), captions)
    of_holes = inpainter.image_text_similarity(images, masks, [_hole_caption(one) for one in hidden])
    return {"image_text_similarity": float(of_pictures.mean()), "hole_text_similarity": float(of_holes.mean())}


def _hole_caption(hidden: HiddenObject) -> str:
    """What the square around the hole should show, in the words of the demo world."""
    item = replace(hidden.item, size="large", place="in the center")
    return replace(_scene_of(hidden.picture), objects=(item,)).caption


def _scene_of(picture: HeldOutPicture) -> Scene:
    scene = demo_scene_of(picture.url)
    if scene is None:
        raise ContractError(f"{picture.url!r} is not a picture of the demo world")
    return scene
