import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.encoders import (
    compact_vocabulary,
    decode_latents,
    encode_moments,
    expand_vocabulary,
    images_to_pixels,
    load_text_encoder,
    load_vae,
    mean_latents,
    pixels_to_images,
    sample_latents,
)

CAPTIONS = ["", "a red circle on a blue square", "wow! two cats, 3 dogs?!", "word " * 100]


def test_pixels_and_images_are_inverse():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    pixels = images_to_pixels(images)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(pixels_to_images(pixels), images)
    assert torch.equal(images_to_pixels(images.numpy()), pixels)
    assert pixels_to_images(pixels * 2).max() == 255


def test_moments_are_those_of_diffusers(vae_dir):
    vae = load_vae(vae_dir)
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1
    moments = encode_moments(vae, pixels)
    assert moments.shape == (2, 8, 8, 4)
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]  # union with tuple
    torch.testing.assert_close(moments[:, :4], theirs.mean)
    torch.testing.assert_close(moments[:, 4:], theirs.logvar)
    torch.testing.assert_close(mean_latents(moments, 0.5), theirs.mode() * 0.5)
    noise = torch.randn(2, 4, 8, 4)
    torch.testing.assert_close(sample_latents(moments, noise, 0.5), (theirs.mean + theirs.std * noise) * 0.5)


def test_logvar_is_clamped_before_float16(vae_dir):
    vae = load_vae(vae_dir)
    with torch.no_grad():
        assert vae.quant_conv is not None
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias[4:] = torch.tensor([-1e6, 1e6, 0, 0])
    moments = encode_moments(vae, torch.zeros(1, 3, 16, 16))
    assert (moments[:, 4] == -30).all()
    assert (moments[:, 5] == 20).all()
    assert moments.half().isfinite().all()
    assert sample_latents(moments.half(), torch.ones(1, 4, 2, 2), 0.18215).isfinite().all()


def test_scaling_is_applied_once_and_undone_by_the_decoder(vae_dir):
    vae = load_vae(vae_dir)
    moments = encode_moments(vae, torch.zeros(1, 3, 16, 16))
    pixels = decode_latents(vae, mean_latents(moments, 0.18215), 0.18215)
    with torch.no_grad():
        theirs = vae.decode(moments[:, :4], return_dict=False)[0]  # pyright: ignore[reportArgumentType]  # FloatTensor
    torch.testing.assert_close(pixels, theirs)


def test_missing_folders_are_not_looked_up_on_a_hub(tmp_path):
    with pytest.raises(ValueError, match="no VAE in"):
        load_vae(tmp_path / "x")
    with pytest.raises(ValueError, match="no text encoder in"):
        load_text_encoder(tmp_path / "x")


def test_tokens(text_encoder):
    import open_clip

    ids = text_encoder.tokenize(CAPTIONS)
    assert torch.equal(ids, open_clip.tokenize(CAPTIONS))
    assert ids[0].tolist() == [49406, 49407, *[0] * 75]
    assert ids[3, -1] == 49407
    with pytest.raises(Exception, match="captions"):
        text_encoder.tokenize("a cat")


def test_embeddings_are_the_penultimate_block_then_ln_final(text_encoder):
    ids = text_encoder.tokenize(CAPTIONS)
    seen = {}
    clip = text_encoder.clip
    hook = clip.transformer.resblocks[-2].register_forward_hook(lambda module, args, out: seen.update(out=out))
    with torch.no_grad():
        clip.encode_text(ids)
        hook.remove()
        expected = clip.ln_final(seen["out"])
    embeddings = text_encoder.embed_text(ids)
    assert embeddings.shape == (4, 77, 32)
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(embeddings, text_encoder.embed_captions(CAPTIONS))
    with torch.no_grad():
        last = clip.ln_final(clip.transformer(clip.token_embedding(ids) + clip.positional_embedding, clip.attn_mask))
    assert not torch.allclose(embeddings, last, atol=1e-2)


def test_embeddings_do_not_depend_on_the_batch(text_encoder):
    together = text_encoder.embed_captions(CAPTIONS)
    alone = torch.cat([text_encoder.embed_captions([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_pictures_and_captions_share_a_space(text_encoder):
    for height, width in ((32, 32), (40, 64), (16, 20)):
        features = text_encoder.embed_image(torch.rand(2, 3, height, width))
        assert features.shape == (2, 24)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    captions = text_encoder.embed_caption(CAPTIONS)
    assert captions.shape == (4, 24)
    torch.testing.assert_close(captions.norm(dim=1), torch.ones(4))


def test_picture_preprocessing_is_open_clips(text_encoder):
    from open_clip.transform import image_transform
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    transform: Any = image_transform(32, is_train=False)
    theirs = transform(image)[None]
    with torch.no_grad():
        expected = text_encoder.clip.encode_image(theirs, normalize=True)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(text_encoder.embed_image(pixels), expected, rtol=1e-4, atol=1e-4)


def test_the_text_tower_alone(text_dir, text_encoder):
    alone = load_text_encoder(text_dir, load_image_tower=False)
    assert not list(alone.clip.visual.parameters())
    assert torch.equal(alone.embed_captions(CAPTIONS), text_encoder.embed_captions(CAPTIONS))
    with pytest.raises(ValueError, match="no image tower"):
        alone.embed_image(torch.rand(1, 3, 32, 32))


def test_a_compact_vocabulary_gives_the_same_embeddings(text_dir, text_encoder, tmp_path):
    used = text_encoder.tokenize(CAPTIONS).unique().tolist()
    compact = compact_vocabulary(load_file(text_dir / "open_clip_model.safetensors"), used)
    save_file(compact, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text((text_dir / "open_clip_config.json").read_text())
    small = (tmp_path / "open_clip_model.safetensors").stat().st_size
    assert small < (text_dir / "open_clip_model.safetensors").stat().st_size / 10
    loaded = load_text_encoder(tmp_path)
    torch.testing.assert_close(
        loaded.embed_captions(CAPTIONS), text_encoder.embed_captions(CAPTIONS), rtol=2e-2, atol=2e-2
    )
    assert loaded.embed_captions(["unheard zebra"]).isfinite().all()


@settings(deadline=None)  # a busy machine is no failure
@given(st.sets(st.integers(0, 19)))
def test_vocabulary_round_trip(used_ids):
    state = {"token_embedding.weight": torch.arange(40.0).reshape(20, 2).half(), "other": torch.ones(1)}
    full = expand_vocabulary(compact_vocabulary(state, used_ids), 20)
    assert set(full) == set(state)
    kept = sorted(used_ids)
    assert torch.equal(full["token_embedding.weight"][kept], state["token_embedding.weight"][kept])
    rest = [i for i in range(20) if i not in used_ids]
    assert len(full["token_embedding.weight"][rest].unique(dim=0)) == min(1, len(rest))
    assert expand_vocabulary(state, 20) == state


def test_a_broken_vocabulary_is_refused():
    ids, rows = torch.tensor([0, 20], dtype=torch.int32), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="the vocabulary has 20 tokens"):
        expand_vocabulary({"token_embedding.ids": ids, "token_embedding.rows": rows}, 20)
    with pytest.raises(ValueError, match="one more than ids"):
        expand_vocabulary({"token_embedding.ids": ids, "token_embedding.rows": rows[:2]}, 50)


def test_weights_that_do_not_fit_are_refused(text_dir, tmp_path):
    config = json.loads((text_dir / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 4
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").symlink_to(text_dir / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_text_encoder(tmp_path)
