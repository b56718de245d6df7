"""Batches in pinned memory: the same bytes, and copied to the GPU beside its work."""

from pathlib import Path

import pytest
import torch

from benchmarks.loader_ours import PREFIX, write
from infra.storage import open_store
from training.data import open_dataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = ("moments", "masked_moments", "mask", "text_embeddings")


def test_pinned_batches_reach_the_gpu_whole(tmp_path: Path):
    write(tmp_path / "store", 128, 64)
    dataset = open_dataset(open_store(str(tmp_path / "store")), PREFIX, tmp_path / "cache")
    copied = []
    with dataset.batches(seed=1, global_batch_size=16, num_steps=24, num_workers=2, pin_memory=True) as batches:
        for batch in batches:
            tensors = [getattr(batch, name) for name in NAMES]
            assert all(tensor.is_pinned() for tensor in tensors)
            copied.append([tensor.to("cuda", non_blocking=True) for tensor in tensors])
            torch.cuda.current_stream().synchronize()
    for step, tensors in enumerate(copied):
        expected = dataset.batch_at(step, seed=1, global_batch_size=16)
        for name, tensor in zip(NAMES, tensors, strict=True):
            assert torch.equal(tensor.cpu(), getattr(expected, name)), (step, name)
