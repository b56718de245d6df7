"""Our text path against transformers': embeddings on shared random weights, and token ids of awkward captions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.encoders import TextEncoder
from model.weights import clip_text_state_dict, write_tokenizer

SMALL: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4}
QUICK_GELU: dict[str, Any] = {**SMALL, "layers": 3}
VIT_H_14: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}

SHORT_AND_LONG = ["", "!", "!!!", "a photo of a cat", "wow! it's 3 dogs ?!", "word " * 74, "word " * 75, "x y " * 200]

CLEAN = [
    "",
    "!",
    "!!!",
    "! ! !!!",
    "cat!",
    "!cat",
    "(!)",
    "what?!!",
    "a photo of a cat",
    "A Photo OF a CaT",
    "SHOUTING, AT NIGHT",
    "  spaces   inside\tand\naround  ",
    "don't, won't, I'll, we've, they're, I'm, he'd",
    "'s 't 're",
    "rock 'n' roll",
    "1234567 3.14 2,000,000 50%",
    "4k 8K uhd",
    "#hashtag @user",
    "http://example.org/a?b=c&d=e#f",
    "user_name-x.y~z",
    "a/b\\c|d",
    "[brackets] {braces} <angles>",
    "``backticks``",
    "...",
    "—dash – dash",
    "naïve café",
    "NAÏVE CAFÉ",
    "Zażółć gęślą jaźń",
    "Ångström",
    "ĲSSELMEER".replace("Ĳ", "IJ"),
    "straße STRASSE",
    "İstanbul",
    "αβγ Ω",
    "кот КОТ",
    "漢字 テスト",
    "한국어",
    "नमस्ते",
    "مرحبا بالعالم",
    "שלום",
    "🎉",
    "🎉🎉 party 🎉",
    "👩‍👩‍👧 family",
    "🏳️‍🌈 flag",
    "🇩🇪",
    "👍🏽",
    "™ ® ©",
    "½ ² ¹",
    "№ 5",
    "a\u00a0b",
    "a\u200bb",
    "word " * 200,
    "x" * 400,
    "漢" * 100,
    "!" * 200,
    "<|endoftext|>",
    "<|startoftext|> a cat <|endoftext|> a dog",
    "<|pad|>",
    "[PAD] </s> <unk>",
    "supercalifragilisticexpialidocious",
    "e\u0301clair",
]
"""Captions to which the exported tokenizer gives open_clip's ids as they are."""

UNCLEAN = [
    "“curly” ‘quotes’ don’t",
    "Tom &amp; Jerry",
    "caf&eacute; &lt;b&gt;bold&lt;/b&gt;",
    "&amp;amp;",
    "&quot;hi&quot; &#39;s &#x1F600;",
    "&nbsp;x &hellip;",
    "&copy 2020",
    "schÃ¶n",
    "â€œquotedâ€",
    "ﬁne ﬀ ligature",
    "Ｆｕｌｌｗｉｄｔｈ",
    "\ufeffbom",
    "\x00a\x1bb",
    "ΣΑΣ",
]
"""Captions that open_clip mends first, which transformers' CLIPTokenizer does not."""

OPEN_CLIP_WORDS = ["<start_of_text>", "a <end_of_text> b"]
"""open_clip's own names of special tokens, which it does not keep ordinary: the one difference that cleaning leaves."""


def transformers_text_model(encoder: TextEncoder) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    from model.weights import text_encoder_config

    config: CLIPTextConfig = text_encoder_config(encoder)
    with torch.device("meta"):
        model = CLIPTextModel(config)
    state = clip_text_state_dict(encoder)
    wanted = model.state_dict()
    if not any(key.startswith("text_model.") for key in wanted):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    assert set(state) == {key for key in wanted if not key.endswith("position_ids")}
    model.load_state_dict(state, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids")
        buffer_owner = model.get_submodule(name.rpartition(".")[0])
        buffer_owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)
    return model.eval()


def random_text_encoder(text_cfg: dict[str, Any], *, quick_gelu: bool = False) -> TextEncoder:
    """A tower whose activations are of ordinary size: with open_clip's own initialization all captions are alike."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    smallest: Any = {"image_size": 8, "patch_size": 8, "layers": 1, "width": 64, "head_width": 64}
    model_cfg: dict[str, Any] = {"embed_dim": text_cfg["width"], "vision_cfg": smallest, "text_cfg": text_cfg}
    if quick_gelu:
        model_cfg["quick_gelu"] = True
    clip: Any = CLIP(**model_cfg)
    clip.visual = nn.Identity()
    nn.init.normal_(clip.token_embedding.weight, std=0.5)
    nn.init.normal_(clip.positional_embedding, std=0.5)
    for block in clip.transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_bias, std=0.1)
        nn.init.normal_(block.ln_1.weight, mean=1, std=0.1)
        nn.init.normal_(block.mlp.c_fc.bias, std=0.1)
    nn.init.normal_(clip.ln_final.weight, mean=1, std=0.1)
    nn.init.normal_(clip.ln_final.bias, std=0.1)
    return TextEncoder(clip, model_cfg, has_image_tower=False)


@torch.no_grad()
def largest_difference(text_cfg: dict[str, Any], captions: list[str], *, quick_gelu: bool = False) -> float:
    """Between `TextEncoder.embed_captions` and transformers' CLIPTextModel of one layer less, on the same weights.

    Args:
        text_cfg: open_clip's, such as `VIT_H_14`.
        captions: padded and cut ones among them.
        quick_gelu: the activation of OpenAI's towers.
    """
    encoder = random_text_encoder(text_cfg, quick_gelu=quick_gelu)
    model = transformers_text_model(encoder)
    assert model.config.num_hidden_layers == text_cfg["layers"] - 1
    difference = 0.0
    for caption in captions:
        ids = encoder.tokenize([caption])
        ours, theirs = encoder.embed_text(ids), model(ids).last_hidden_state
        assert 0.2 < float(ours.std()) < 5
        difference = max(difference, float((ours - theirs).abs().max()))
    return difference


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_embeddings_are_those_of_transformers_with_one_layer_less(quick_gelu: bool):
    text_cfg = QUICK_GELU if quick_gelu else SMALL
    assert largest_difference(text_cfg, SHORT_AND_LONG, quick_gelu=quick_gelu) < 1e-5


def test_another_layer_would_be_told_apart():
    encoder = random_text_encoder(SMALL)
    model = transformers_text_model(encoder)
    ids = encoder.tokenize(["a photo of a cat"])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-2]
    assert float((encoder.embed_text(ids) - hidden).abs().max()) > 0.1


@pytest.mark.soak
def test_full_size_embeddings_are_those_of_transformers():
    assert largest_difference(VIT_H_14, SHORT_AND_LONG) < 1e-5


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(text_encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, text_encoder)
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def ids_of(tokenizer: Any, caption: str) -> list[int]:
    return tokenizer(caption, padding="max_length", max_length=77, truncation=True).input_ids


def cleaned(caption: str) -> str:
    from open_clip.tokenizer import get_clean_fn

    return get_clean_fn("lower")(caption)


@pytest.mark.parametrize("caption", CLEAN)
def test_exported_tokenizer_gives_open_clips_ids(tokenizer: Any, text_encoder: TextEncoder, caption: str):
    assert ids_of(tokenizer, caption) == text_encoder.tokenize([caption])[0].tolist()


def test_an_empty_caption_is_start_end_and_zeros(tokenizer: Any):
    assert ids_of(tokenizer, "") == [49406, 49407] + [0] * 75
    assert tokenizer.pad_token_id == 0


def test_an_exclamation_mark_is_a_word(tokenizer: Any):
    assert ids_of(tokenizer, "!")[:3] == [49406, 256, 49407]
    assert ids_of(tokenizer, "!!!")[:3] == [49406, 995, 49407]


@pytest.mark.parametrize("caption", UNCLEAN)
def test_what_open_clip_mends_must_be_mended_before(tokenizer: Any, text_encoder: TextEncoder, caption: str):
    """The exact boundary: CLIPTokenizer's cleaning is code, not data. If this fails, transformers has learned it."""
    wanted = text_encoder.tokenize([caption])[0].tolist()
    assert ids_of(tokenizer, caption) != wanted
    assert ids_of(tokenizer, cleaned(caption)) == wanted


@pytest.mark.parametrize("caption", OPEN_CLIP_WORDS)
def test_open_clips_own_special_words_are_ordinary_text_here(tokenizer: Any, text_encoder: TextEncoder, caption: str):
    ours = text_encoder.tokenize([caption])[0].tolist()
    assert sum(token in (49406, 49407) for token in ours) == 3
    assert sum(token in (49406, 49407) for token in ids_of(tokenizer, cleaned(caption))) == 2


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=0x24F, exclude_categories=["Cs"]), max_size=120))
def test_any_clean_latin_caption_has_open_clips_ids(tokenizer: Any, text_encoder: TextEncoder, caption: str):
    caption = cleaned(caption)
    if cleaned(caption) == caption:  # some text is mended in several rounds
        assert ids_of(tokenizer, caption) == text_encoder.tokenize([caption])[0].tolist()


def test_the_tokenizer_survives_being_saved_again(tokenizer: Any, text_encoder: TextEncoder, tmp_path: Path):
    """`pipeline.save_pretrained` writes a tokenizer.json, in which an id has one name."""
    from transformers import AutoTokenizer, CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    for again in (CLIPTokenizer.from_pretrained(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert again.pad_token_id == 0
        for caption in CLEAN:
            assert ids_of(again, caption) == text_encoder.tokenize([caption])[0].tolist()


def test_both_files_name_the_same_pad_token(text_encoder: TextEncoder, tmp_path: Path):
    """The released tokenizer's files disagree, and versions of transformers chose differently."""
    write_tokenizer(tmp_path, text_encoder)
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {key: config[key] for key in special} == special
    assert json.loads((tmp_path / "vocab.json").read_text())[config["pad_token"]] == 0
