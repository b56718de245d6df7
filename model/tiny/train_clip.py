"""Trains the tiny OpenCLIP model: the open_clip class and tokenizer of the full one, a few layers wide and deep.

Beside the other captions of its batch, each picture meets its own caption with one word changed: colour, shape and
place have to be told apart, which captions drawn at random would hardly ask for.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional

from model.encoders import TextEncoder, compact_vocabulary
from model.safetensors_writer import save_safetensors
from model.tiny.corpus import TRAINING_SEED, Corpus, render
from model.tiny.world import COLORS, SHAPES

LOGGER = logging.getLogger(__name__)

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 64, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3},
}
BATCH_SIZE = 128
LEARNING_RATE = 1.5e-3
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_OPPOSITES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top", "large": "small", "small": "large"}


def train_clip(output: Path, *, num_steps: int, num_pictures: int, cache: Path) -> None:
    """Trains and writes ``open_clip_config.json`` and ``open_clip_model.safetensors`` (fp16, compact vocabulary).

    Args:
        output: The folder to write.
        num_steps: Optimizer steps.
        num_pictures: Size of the corpus.
        cache: Folder for drawn pictures.
    """
    torch.manual_seed(0)
    corpus = render(TRAINING_SEED, 0, num_pictures, cache=cache)
    clip = CLIP(**MODEL_CFG).train()  # pyright: ignore[reportArgumentType]  # open_clip casts dicts to its config classes
    tokenizer = TextEncoder(CLIP(**MODEL_CFG), MODEL_CFG)  # pyright: ignore[reportArgumentType]  # as above; for its tokenize()
    ids = tokenizer.tokenize(corpus.captions)
    LOGGER.info("CLIP: %d parameters beside the token table", _num_parameters(clip))
    optimizer = torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, num_steps, pct_start=0.1)
    for step, (images, captions, changed) in zip(range(num_steps), _batches(corpus), strict=False):
        pixels = _normalized(images)
        texts = tokenizer.tokenize([*captions, *changed])
        loss, accuracy = _loss(clip, pixels, texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            LOGGER.info(
                "CLIP step %d: loss %.3f, own caption found among %d: %.1f %%",
                step,
                loss.item(),
                2 * BATCH_SIZE,
                100 * accuracy,
            )
    output.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)}}
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {key: value.half() for key, value in clip.state_dict().items() if key != "attn_mask"}
    used_ids = {int(token) for token in ids.unique()}
    save_safetensors(output / "open_clip_model.safetensors", compact_vocabulary(state, used_ids))


def _num_parameters(clip: CLIP) -> int:
    return sum(p.numel() for name, p in clip.named_parameters() if name != "token_embedding.weight")


def _normalized(images: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (MEAN, STD))
    return (pixels - mean) / std


def _batches(corpus: Corpus) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
    """Endless batches: pictures, their captions, and the captions with one word changed."""
    draws = np.random.default_rng(0)
    while True:
        rows = draws.choice(len(corpus.scenes), size=BATCH_SIZE, replace=False)
        captions = [corpus.scenes[row].caption for row in rows]
        yield corpus.images[rows], captions, [_with_one_word_changed(draws, caption) for caption in captions]


def _with_one_word_changed(draws: np.random.Generator, caption: str) -> str:
    words = caption.split(" ")
    changeable = [i for i, word in enumerate(words) if word in COLORS or word in SHAPES or word in _OPPOSITES]
    index = int(draws.choice(changeable))
    word = words[index]
    if word in _OPPOSITES:
        words[index] = _OPPOSITES[word]
    else:
        kinds = list(COLORS) if word in COLORS else list(SHAPES)
        words[index] = str(draws.choice([kind for kind in kinds if kind != word]))
    return " ".join(words)


def _encode_text(clip: Any, texts: Tensor) -> Tensor:
    """`clip.encode_text` without the padding: attention is causal, so what follows a caption changes nothing in it."""
    texts = texts[:, : int((texts != 0).sum(dim=1).max())]
    length = texts.shape[1]
    hidden = clip.token_embedding(texts) + clip.positional_embedding[:length]
    hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
    return hidden[torch.arange(len(texts)), texts.argmax(dim=-1)] @ clip.text_projection


def _loss(clip: CLIP, pixels: Tensor, texts: Tensor) -> tuple[Tensor, float]:
    """Contrastive loss over captions and changed captions, and how often a picture finds its own."""
    with torch.autocast("cpu", torch.bfloat16):
        image = clip.encode_image(pixels, normalize=True)
        text = functional.normalize(_encode_text(clip, texts), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
    own = torch.arange(len(pixels))
    loss = functional.cross_entropy(logits, own) + functional.cross_entropy(logits[:, : len(pixels)].T, own)
    return loss / 2, (logits.argmax(dim=1) == own).float().mean().item()
