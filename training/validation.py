"""Validation: the EMA weights repaint held-out pictures, beside what needs no model, and a report says how well.

``python -m training.validation --run FILE``, with a `ValidationSpec`. Nothing here was trained on: only rows of the
dataset's validation split are read. The same inputs give the same figures on one machine.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from infra.bundles import commit_bundle, find_bundle, load_bundle
from infra.child import emit, run_as_child
from infra.storage import open_store
from model.masks import draw_masks
from model.objective import add_noise, per_sample_loss, target
from model.sampler import noise_for
from model.unet import unet_input
from preprocessing.contracts.manifest import Manifest
from training.heldout import HeldOutPicture, HeldOutRows
from training.inpainting import Inpainter, load_inpainter, mean_fill, telea_fill
from training.loss_tally import NUM_LOSS_BUCKETS
from training.metrics import masked_l1, masked_psnr_db, masked_ssim
from training.report import write_report
from training.runspec_validation import ValidationSpec
from training.validation_objects import ObjectTest, hide_objects, is_demo_row, run_object_test

LOGGER = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
METRICS: Final = {"masked_psnr_db": masked_psnr_db, "masked_ssim": masked_ssim, "masked_l1": masked_l1}
METHODS: Final = ("model", "mean_fill", "telea")


@dataclass(frozen=True)
class FamilyTest:
    """One mask family's figures, and the pictures that they were taken from.

    Attributes:
        name: The mask family.
        report: Method → metric → mean over the pictures.
        num_samples: How many pictures.
        masks: (n, side, side).
        images: Method → (n, side, side, 3) uint8; ``shuffled`` and ``original`` too.
    """

    name: str
    report: dict[str, dict[str, float]]
    num_samples: int
    masks: np.ndarray
    images: dict[str, np.ndarray]


def validate(spec: ValidationSpec, scratch: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Makes and commits the report of one checkpoint.

    Args:
        spec: What to validate.
        scratch: An empty folder for files in between.
        on_progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        ``prefix`` of the report's folder, its ``summary``, and ``was_done``: whether it was there before.

    Raises:
        ValueError: Something asked for does not fit the dataset or the model.
    """
    store = open_store(spec.store_uri)
    prefix = spec.report_prefix(store)
    done = find_bundle(store, prefix)
    if done is not None:
        return {"prefix": prefix, "summary": done.metadata["summary"], "was_done": True}
    notify = on_progress or (lambda what, num_done, num_total: None)
    judge_folder = _judge_folder(spec)
    rows = HeldOutRows(store, spec.dataset_prefix, scratch)
    inpainter = load_inpainter(
        store,
        spec.checkpoint_prefix,
        spec.model,
        prediction_type=spec.prediction_type,
        schedule=spec.schedule,
        config=spec.config,
        scratch=scratch,
    )
    if not inpainter.text.compares:
        LOGGER.warning("the base's text encoder came without its image tower; image_text_similarity is left out")
    pictures = rows.choose(spec.config.num_samples, "validation")
    families = []
    for index, family in enumerate(spec.config.mask_families):
        notify(f"repaint {family}", index, len(spec.config.mask_families))
        families.append(validate_family(inpainter, pictures, family, spec.config.seed))
    objects = None
    if judge_folder is not None:
        notify("prompt-following", 0, 1)
        objects = _object_test(spec, inpainter, rows, judge_folder)
    notify("loss", 0, 1)
    masks = families[-1].masks
    losses = {
        kind: held_out_loss(inpainter, pictures, hole, spec.config.seed, spec.config.batch_size)
        for kind, hole in (("partial", masks), ("full", np.ones_like(masks)))
    }
    report = assemble_report(spec, rows.manifest, pictures, families, objects, losses)
    folder = scratch / "report"
    write_report(folder, report, pictures, families, objects, num_rows=spec.config.num_grid_rows)
    commit_bundle(
        store,
        prefix,
        folder,
        kind="report",
        run_id=spec.run_id,
        step=spec.step,
        metadata={
            "digest": spec.digest,
            "summary": report["summary"],
            "checkpoint": spec.checkpoint_prefix,
            "dataset": spec.dataset_prefix,
        },
    )
    committed = load_bundle(store, prefix)
    return {"prefix": prefix, "summary": committed.metadata["summary"], "was_done": False}


def validate_family(inpainter: Inpainter, pictures: Sequence[HeldOutPicture], family: str, seed: int) -> FamilyTest:
    """Repaints the pictures under masks of one family, and measures.

    Args:
        inpainter: The model.
        pictures: Held-out ones.
        family: Of the masks; drawn at full resolution, one a picture.
        seed: Of the masks.

    Returns:
        For each method the three metrics inside the hole, and the cosine between the caption and the square around it.
        ``original`` has the cosine only. ``shuffled`` is the model with another picture's caption, its cosine taken
        with the true caption, and as ``shuffled_given`` with the one that it was given; a text encoder that cannot
        compare pictures with captions gives no cosines. ``model`` has also
        ``known_region_l1``: how far the decoder's picture is from the original outside the hole, before composition.
    """
    images = np.stack([picture.image for picture in pictures])
    captions = [picture.caption for picture in pictures]
    uids = [picture.uid for picture in pictures]
    masks = draw_masks(family, images.shape[1], seed, uids, 0)
    repainted = inpainter.repaint(images, masks, captions, uids, family)
    made = {
        "original": images,
        "model": repainted.composited,
        "mean_fill": mean_fill(images, masks),
        "telea": telea_fill(images, masks),
    }
    given = deranged(captions)
    if given is not None:
        made["shuffled"] = inpainter.repaint(images, masks, given, uids, family).composited
    report: dict[str, dict[str, float]] = {}
    for name, result in made.items():
        report[name] = (
            {} if name == "original" else {key: float(f(result, images, masks).mean()) for key, f in METRICS.items()}
        )
        if inpainter.text.compares:
            similarity = inpainter.image_text_similarity(result, masks, captions)
            report[name]["image_text_similarity"] = float(similarity.mean())
    if given is not None and inpainter.text.compares:
        similarity = inpainter.image_text_similarity(made["shuffled"], masks, given)
        report["shuffled_given"] = {"image_text_similarity": float(similarity.mean())}
    known = masks.all(axis=(1, 2)) == 0
    if known.any():
        leak = masked_l1(repainted.raw[known], images[known], 1 - masks[known])
        report["model"]["known_region_l1"] = float(leak.mean())
    return FamilyTest(family, report, len(pictures), masks, made)


def deranged(captions: Sequence[str]) -> list[str] | None:
    """Gives each picture another one's caption: rotated by the shift that leaves the fewest with an equal caption.

    Returns:
        The captions in their new order; None where all are equal, or there is one only.
    """
    num_kept = {
        shift: sum(captions[i] == captions[i - shift] for i in range(len(captions)))
        for shift in range(1, len(captions))
    }
    if not num_kept or min(num_kept.values()) == len(captions):
        return None
    shift = min(num_kept, key=lambda one: (num_kept[one], one))
    return [captions[i - shift] for i in range(len(captions))]


@torch.no_grad()
def held_out_loss(
    inpainter: Inpainter, pictures: Sequence[HeldOutPicture], masks: np.ndarray, seed: int, batch_size: int
) -> dict[str, float]:
    """The unweighted loss on held-out pictures, at one fixed timestep in the middle of each bucket of the schedule.

    The same pictures, masks and noise whatever the checkpoint, so that figures of two checkpoints can be compared.

    Args:
        inpainter: The model.
        pictures: Held-out ones.
        masks: (n, side, side).
        seed: Of the noise.
        batch_size: Pictures at once.

    Returns:
        ``t_0050`` and so on → mean squared error of the prediction.
    """
    alphas = inpainter.alphas_cumprod
    width = len(alphas) // NUM_LOSS_BUCKETS
    timesteps = [width * bucket + width // 2 for bucket in range(NUM_LOSS_BUCKETS)]
    losses: dict[int, list[torch.Tensor]] = {t: [] for t in timesteps}
    for start in range(0, len(pictures), batch_size):
        batch, part = pictures[start : start + batch_size], masks[start : start + batch_size]
        images = np.stack([picture.image for picture in batch])
        latents = inpainter.latents(images)
        mask, masked_latents = inpainter.latent_masks(part), inpainter.masked_latents(images, part)
        text = inpainter.text.embed_captions([picture.caption for picture in batch])
        noise = noise_for(seed, [picture.uid for picture in batch], tuple(latents.shape[1:]), name="loss").to(latents)
        for t in timesteps:
            steps = torch.full((len(batch),), t, device=latents.device)
            on_device = alphas.to(latents.device)
            noisy = add_noise(latents, noise, steps, on_device)
            sample = unet_input(noisy, mask, masked_latents)
            prediction = inpainter.unet(sample, steps, text, return_dict=False)[0].float()
            wanted = target(inpainter.prediction_type, latents, noise, steps, on_device)
            losses[t].append(per_sample_loss(prediction, wanted).cpu())
    return {f"t_{t:04d}": float(torch.cat(values).double().mean()) for t, values in losses.items()}


def assemble_report(
    spec: ValidationSpec,
    manifest: Manifest,
    pictures: Sequence[HeldOutPicture],
    families: Sequence[FamilyTest],
    objects: ObjectTest | None,
    losses: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Puts the figures together as ``report.json`` holds them; ``summary`` is flat, and what channels are moved by."""
    by_method = {
        method: _mean_over_families([family.report[method] for family in families])
        for method in families[0].report
        if all(method in family.report for family in families)
    }
    summary = dict(by_method["model"])
    for method in METHODS[1:]:
        summary |= {f"{method}_{key}": value for key, value in by_method[method].items()}
        summary[f"psnr_gain_over_{method}_db"] = summary["masked_psnr_db"] - by_method[method]["masked_psnr_db"]
    for method in ("original", "shuffled"):
        if "image_text_similarity" in by_method.get(method, {}):
            summary[f"{method}_image_text_similarity"] = by_method[method]["image_text_similarity"]
    summary["validation_loss"] = float(np.mean(list(losses["partial"].values())))
    summary["full_mask_validation_loss"] = float(np.mean(list(losses["full"].values())))
    if objects is not None:
        conditions = objects.report["conditions"]
        summary |= {key: value for key, value in conditions["model"].items() if key.endswith("_agreement")}
        for method in ("model", *METHODS[1:], "shuffled", "original"):
            prefix = "object" if method == "model" else f"{method}_object"
            for key in ("image_text_similarity", "hole_text_similarity"):
                if key in conditions[method]:
                    summary[f"{prefix}_{key}"] = conditions[method][key]
        summary["shuffled_object_agreement"] = conditions["shuffled"]["object_agreement"]
        summary["shuffled_given_object_agreement"] = conditions["shuffled_given"]["object_agreement"]
        summary["original_object_agreement"] = conditions["original"]["object_agreement"]
    return {
        "run_id": spec.run_id,
        "step": spec.step,
        "checkpoint": spec.checkpoint_prefix,
        "dataset": {"prefix": spec.dataset_prefix, "digest": manifest.digest, "split": "validation"},
        "base": spec.model.base,
        "prediction_type": spec.prediction_type,
        "config": spec.config.model_dump(mode="json"),
        "method": (
            "EMA weights; the masked picture enters as the mean of the VAE's posterior; DDIM, eta 0; noise fixed per "
            "sample; composited; metrics inside the hole only"
        ),
        "num_samples": len(pictures),
        "summary": summary,
        "by_method": by_method,
        "by_mask": {family.name: {"num_samples": family.num_samples, **family.report} for family in families},
        "baselines": {method: by_method[method] for method in METHODS[1:]},
        "loss_by_timestep": losses,
        "prompt_following": None if objects is None else objects.report,
        "uids": [picture.uid for picture in pictures],
    }


def _mean_over_families(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = [key for key in reports[0] if all(key in report for report in reports)]
    return {key: float(np.mean([report[key] for report in reports])) for key in keys}


def _judge_folder(spec: ValidationSpec) -> Path | None:
    """Where the judge of the prompt-following test is; None if the test is not asked for or the base has none."""
    folder = spec.model.directory / "judge"
    if not spec.config.num_object_samples:
        return None
    if not folder.is_dir():
        LOGGER.warning(
            "%s, but %s is not there: only the demo world's base has a judge; left out", _asked(spec), folder
        )
        return None
    return folder


def _object_test(
    spec: ValidationSpec, inpainter: Inpainter, rows: HeldOutRows, judge_folder: Path
) -> ObjectTest | None:
    """The prompt-following test; None where the dataset holds no pictures of the demo world for it."""
    from model.tiny.judge import load_judge, object_crop  # the demo's own: real validations never load it

    hidden = hide_objects(rows.choose(spec.config.num_object_samples, "objects", is_demo_row), spec.config.seed)
    if not hidden:
        LOGGER.warning("%s, but the dataset holds no two held-out demo pictures; left out", _asked(spec))
        return None
    return run_object_test(inpainter, hidden, load_judge(judge_folder), object_crop)


def _asked(spec: ValidationSpec) -> str:
    return f"validation.num_object_samples: {spec.config.num_object_samples}"


def main(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work: validates what the spec says, and reports progress as events."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    spec = ValidationSpec.model_validate(data)
    started = time.monotonic()

    def on_progress(what: str, num_done: int, num_total: int) -> None:
        LOGGER.info("%s (%d of %d)", what, num_done + 1, num_total)
        emit({"event": "validation", "what": what, "num_done": num_done, "num_total": num_total})

    with tempfile.TemporaryDirectory(prefix="validation-", dir=folder) as scratch:
        result = validate(spec, Path(scratch), on_progress)
    return {**result, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    sys.exit(run_as_child(main))
