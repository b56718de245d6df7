"""The demo world and the tiny models that are shipped for it: do they really work?"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from model.crop import central_square
from model.encoders import (
    decode_latents,
    encode_moments,
    images_to_pixels,
    load_text_encoder,
    load_vae,
    mean_latents,
    pixels_to_images,
)
from model.tiny.corpus import TRAINING_SEED
from model.tiny.judge import load_judge, object_crop
from model.tiny.world import COLORS, SHAPES, Scene, draw, scene_at

WEIGHTS = Path(__file__).parents[2] / "model" / "tiny" / "weights"
SEED = 91  # neither the training world nor the demo's
NUM_SCENES = 96


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    assert SEED != TRAINING_SEED
    return [scene_at(SEED, index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> np.ndarray:
    return np.stack([central_square(draw(scene), 64)[0] for scene in scenes])


def test_shipped_weights_are_small_enough():
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")]
    assert max(sizes) <= 4_000_000
    assert sum(sizes) <= 8_000_000


def test_a_picture_is_a_pure_function_of_seed_and_index():
    code = "import hashlib, model.tiny.world as w; print(hashlib.sha1(w.draw(w.scene_at(3, 4)).tobytes()).hexdigest())"
    here = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)]
    assert here[0] == here[1]


def test_scenes_vary_and_captions_say_what_is_there():
    many = [scene_at(SEED, index) for index in range(600)]
    objects = [item for scene in many for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.color for item in objects} == set(COLORS)
    assert Counter(len(scene.objects) for scene in many)[2] > 150
    assert len({(scene.width_px, scene.height_px) for scene in many}) > 20
    for scene in many:
        for item in scene.objects:
            assert f"{item.color} {item.shape} {item.place}" in scene.caption
            assert -0.03 <= min(item.box) <= max(item.box) <= 1.03


def test_the_judge_tells_real_objects(scenes: list[Scene], images: np.ndarray):
    truth = [(item.color, item.shape) for scene in scenes for item in scene.objects]
    crops = [
        object_crop(image, item.box) for image, scene in zip(images, scenes, strict=True) for item in scene.objects
    ]
    verdicts = list(zip(*load_judge().classify(np.stack(crops)), strict=True))
    assert np.mean([verdict == fact for verdict, fact in zip(verdicts, truth, strict=True)]) > 0.97


def test_the_vae_keeps_what_a_picture_shows(scenes: list[Scene], images: np.ndarray):
    vae = load_vae(WEIGHTS / "vae")
    scaling_factor = vae.config["scaling_factor"]
    latents = mean_latents(encode_moments(vae, images_to_pixels(images)), scaling_factor)
    assert 0.8 < latents.std().item() < 1.25
    decoded = pixels_to_images(decode_latents(vae, latents, scaling_factor)).numpy()
    mse = np.square(decoded.astype(float) - images).mean(axis=(1, 2, 3))
    assert np.mean(10 * np.log10(255**2 / mse)) > 27
    truth = [(item.color, item.shape) for scene in scenes for item in scene.objects]
    crops = [
        object_crop(image, item.box) for image, scene in zip(decoded, scenes, strict=True) for item in scene.objects
    ]
    verdicts = list(zip(*load_judge().classify(np.stack(crops)), strict=True))
    assert np.mean([verdict == fact for verdict, fact in zip(verdicts, truth, strict=True)]) > 0.8


def test_clip_finds_the_caption_of_a_picture(scenes: list[Scene], images: np.ndarray):
    encoder = load_text_encoder(WEIGHTS / "open_clip")
    captions = encoder.embed_caption([scene.caption for scene in scenes])
    pictures = encoder.embed_image(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    found = (pictures @ captions.T).argmax(dim=1) == torch.arange(NUM_SCENES)
    assert found.float().mean() > 0.8  # chance is 1 in 96
