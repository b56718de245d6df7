"""What determines a result, and what names a row."""

import shutil
from pathlib import Path

import pytest

from preprocessing.contracts.digests import canonical_json, digest_of, is_held_out, uid_of, weights_sha256


def test_weights_are_identified_by_names_and_contents(tmp_path: Path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "a.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    before = weights_sha256(model)
    (model / "notes.txt").write_text("does not count")
    shutil.copytree(model, tmp_path / "copy")
    assert weights_sha256(tmp_path / "copy") == before
    (model / "config.json").write_text("{ }")
    changed = weights_sha256(model)
    (model / "config.json").rename(model / "other.json")
    assert len({before, changed, weights_sha256(model)}) == 3
    with pytest.raises(ValueError, match="has no weights"):
        weights_sha256(tmp_path / "nothing")


def test_a_digest_follows_everything_that_it_is_made_of():
    base = digest_of("select", 1, {"a": 1, "b": 2}, ["x"], {"vae": "y"})
    assert base == digest_of("select", 1, {"b": 2, "a": 1}, ["x"], {"vae": "y"})
    others = [
        digest_of("encode", 1, {"a": 1, "b": 2}, ["x"], {"vae": "y"}),
        digest_of("select", 2, {"a": 1, "b": 2}, ["x"], {"vae": "y"}),
        digest_of("select", 1, {"a": 1, "b": 3}, ["x"], {"vae": "y"}),
        digest_of("select", 1, {"a": 1, "b": 2}, ["z"], {"vae": "y"}),
        digest_of("select", 1, {"a": 1, "b": 2}, ["x"], {"vae": "z"}),
    ]
    assert len({base, *others}) == 6
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_uids_tell_url_and_caption_apart_and_never_change():
    assert uid_of("a", "bc") != uid_of("ab", "c")
    assert uid_of("http://example.com/1.jpg", "a cat") == "046cfdf693949c530401b87b18f7e06b"


def test_the_held_out_share_is_what_was_asked_for():
    uids = [uid_of(str(index), "") for index in range(20_000)]
    held_out = {uid for uid in uids if is_held_out(uid, 0.1)}
    assert 0.09 < len(held_out) / len(uids) < 0.11
    assert {uid for uid in uids if is_held_out(uid, 0.02)} <= held_out
    assert not any(is_held_out(uid, 0) for uid in uids)
