"""Hostile files against the decoders: nobody dies but a decoder, and every file ends as its sample says."""

import collections
import io
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parent))

from image_corpus import PAYLOAD, Benign, Sample, benign, corpus, encoded, textured

from preprocessing.contracts.config import DownloadConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.download.decoding import Decoders, Limits
from preprocessing.download.images import NormalizedImage, normalize_image

CONFIG = DownloadConfig()
MAX_WAIT_S = 15.0


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    with Decoders(CONFIG, 2) as pool:
        yield pool


def peak_rss_bytes(pids: tuple[int, ...]) -> int:
    peaks = [0]
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        if status.exists():
            found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            peaks += [1024 * int(line.split()[1]) for line in found]
    return max(peaks)


@pytest.mark.parametrize("is_heavy", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_corpus(decoders: Decoders, is_heavy: bool) -> None:
    samples = [sample for sample in corpus() if is_heavy or not sample.is_heavy]
    assert len(samples) >= 400
    assert len({sample.name for sample in samples}) == len(samples)
    born_with = peak_rss_bytes(decoders.pids)
    peak = 0

    one_at_a_time = threading.Lock()  # Pillow's writers look at each other's state

    def ask(sample: Sample) -> tuple[Sample, NormalizedImage | tuple[Reason, str], float]:
        with one_at_a_time:
            data = sample.make()
        start = time.monotonic()
        result = decoders.normalize(data)
        return sample, result, time.monotonic() - start

    wrong: list[str] = []
    tally: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(2) as pool:
        for sample, result, waited_s in pool.map(ask, samples):
            peak = max(peak, peak_rss_bytes(decoders.pids))
            reason = None if isinstance(result, NormalizedImage) else result[0]
            tally[str(reason)] += 1
            if reason not in sample.expected:
                wrong.append(f"{sample.name}: {result if reason else 'accepted'}")
            if waited_s > MAX_WAIT_S:
                wrong.append(f"{sample.name}: {waited_s:.1f} s")
            if isinstance(result, NormalizedImage):
                check_stored(result)
    assert not wrong
    assert sum(tally.values()) == len(samples)
    assert 0 < peak <= born_with + Limits().memory_bytes
    assert tally[str(Reason.DECODER_DIED)] == 0


def check_stored(stored: NormalizedImage) -> None:
    image = Image.open(io.BytesIO(stored.image), formats=["JPEG"])
    image.load()
    assert image.mode == "RGB"
    assert image.size == (stored.width, stored.height)
    assert not {"exif", "icc_profile", "comment", "photoshop"} & set(image.info)
    assert PAYLOAD not in stored.image
    assert stored.image.endswith(b"\xff\xd9")


def plain(data: bytes) -> Image.Image:
    """The way of Pillow's own tutorial: open, turn upright, over white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def test_benign_pictures_are_taken_and_their_pixels_are_those_of_a_plain_decoder(decoders: Decoders) -> None:
    pictures = list(benign(1000))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda picture: decoders.normalize(picture.data), pictures))
    refused = [(p.name, r) for p, r in zip(pictures, results, strict=True) if not isinstance(r, NormalizedImage)]
    assert len(refused) <= 1, refused
    differing = [
        picture.name
        for picture, result in zip(pictures, results, strict=True)
        if isinstance(result, NormalizedImage) and not same_pixels(picture, result)
    ]
    assert not differing


def same_pixels(picture: Benign, stored: NormalizedImage) -> bool:
    """Kept as it was: the same pixels, bit for bit. Encoded anew: the same as if a plain decode had been."""
    expected = np.asarray(plain(picture.data))
    kept = np.asarray(Image.open(io.BytesIO(stored.image)))
    if np.array_equal(kept, expected):
        return True
    again = simplejpeg.encode_jpeg(
        np.ascontiguousarray(expected), quality=CONFIG.encode_quality, colorsubsampling="444", colorspace="RGB"
    )
    # `alpha_composite` and `paste` may round a half differently, which is one step of 255 before encoding.
    is_blended = "RGBA" in picture.name or "LA" in picture.name or "alpha" in picture.name
    return stored.image == again or (is_blended and np.abs(kept.astype(int) - expected).max() <= 24)


def psnr_db(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2)))


def test_scaled_decoding_is_equal_to_the_eye() -> None:
    """Against a full decode and Pillow's Lanczos: at least 35 dB, over sizes at which each scale is used."""
    config = DownloadConfig(image_size_px=96, encode_quality=100)
    found: dict[str, float] = {}
    sizes = [(1.1, 1), (1.5, 2), (1.99, 0), (2.0, 2), (2.7, 1), (3.0, 2), (4.0, 2), (4.6, 0), (5.3, 2), (8.0, 2)]
    for number in range(40):
        ratio, subsampling = sizes[number % len(sizes)]
        height = round(96 * ratio) + number % 2
        picture = textured(height * (3 + number % 3) // 3, height, number % 7, roughness=0.5 + number % 4 / 3)
        options = {"quality": 80 + number % 16, "subsampling": subsampling, "progressive": number % 5 == 0}
        data = encoded(picture, "JPEG", **options)
        stored = normalize_image(data, config)
        image = Image.open(io.BytesIO(stored.image))
        full = Image.open(io.BytesIO(data)).convert("RGB").resize(image.size, Image.Resampling.LANCZOS)
        found[f"{number}: {ratio} × {options}"] = psnr_db(np.asarray(image), np.asarray(full))
    assert min(found.values()) >= 35, sorted(found.items(), key=lambda item: item[1])[:5]


def test_a_small_plain_jpeg_keeps_its_own_pixels() -> None:
    for progressive in (False, True):
        for subsampling in (0, 1, 2):
            data = encoded(
                textured(200, 150),
                "JPEG",
                quality=70,
                subsampling=subsampling,
                progressive=progressive,
                comment=PAYLOAD,
            )
            stored = normalize_image(data + PAYLOAD, CONFIG)
            assert len(stored.image) < len(data)
            assert PAYLOAD not in stored.image
            assert np.array_equal(
                np.asarray(Image.open(io.BytesIO(stored.image))), np.asarray(Image.open(io.BytesIO(data)))
            )
            scan = data[data.index(b"\xff\xda") :]
            assert stored.image.endswith(scan)
            assert normalize_image(stored.image, CONFIG).image == stored.image
    exif = Image.Exif()
    exif[0x0112] = 3
    for other in (
        encoded(textured(200, 150), "JPEG", keep_rgb=True),
        encoded(textured(200, 150).convert("L"), "JPEG"),
        encoded(textured(200, 150), "JPEG", exif=exif.tobytes()),
    ):
        image = Image.open(io.BytesIO(normalize_image(other, CONFIG).image))
        assert image.mode == "RGB"
        assert not image.getexif()
