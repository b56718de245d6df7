"""The rules, one by one, and what holds whatever the rows are."""

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.block_lists import BlockLists
from preprocessing.contracts.config import SelectConfig
from preprocessing.contracts.reasons import Reason
from preprocessing.filters import judge
from preprocessing.laion import ROWS

LIMITS = SelectConfig(min_side_px=64, max_caption_chars=20, min_similarity=0.25, min_aesthetic=4.5)
GOOD = {
    "url": "http://a.example/1.jpg",
    "caption": "a red circle",
    "width": 100,
    "height": 80,
    "similarity": 0.3,
    "punsafe": 0.01,
    "pwatermark": 0.2,
    "aesthetic": 5.0,
    "language": None,
    "expected_md5": None,
    "expected_sha256": None,
    "is_text": True,
}


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=dict(ROWS))


def reason_of(config: SelectConfig = LIMITS, **changes: Any) -> str | None:
    return judge(frame(GOOD | changes), config)["reason"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"url": None}, Reason.NO_URL),
        ({"url": ""}, Reason.NO_URL),
        ({"url": " \t"}, Reason.NO_URL),
        ({"punsafe": None}, Reason.PUNSAFE_MISSING),
        ({"punsafe": math.nan}, Reason.PUNSAFE_MISSING),
        ({"punsafe": math.inf}, Reason.PUNSAFE_MISSING),
        ({"punsafe": -math.inf}, Reason.PUNSAFE_MISSING),
        ({"punsafe": 0.1}, Reason.PUNSAFE_HIGH),
        ({"punsafe": float(np.float32(0.1))}, Reason.PUNSAFE_HIGH),
        ({"punsafe": 0.99}, Reason.PUNSAFE_HIGH),
        ({"punsafe": float(np.nextafter(np.float32(0.1), np.float32(0)))}, None),
        ({"punsafe": 0.0}, None),
        ({"pwatermark": None}, Reason.PWATERMARK_MISSING),
        ({"pwatermark": math.nan}, Reason.PWATERMARK_MISSING),
        ({"pwatermark": 0.8}, Reason.PWATERMARK_HIGH),
        ({"pwatermark": float(np.float32(0.8))}, Reason.PWATERMARK_HIGH),
        ({"pwatermark": 0.79}, None),
        ({"similarity": 0.2}, Reason.SIMILARITY_LOW),
        ({"similarity": None}, Reason.SIMILARITY_LOW),
        ({"similarity": 0.25}, None),
        ({"aesthetic": 4.4}, Reason.AESTHETIC_LOW),
        ({"aesthetic": math.nan}, Reason.AESTHETIC_LOW),
        ({"aesthetic": 4.5}, None),
        ({"width": None}, Reason.SIDE_SMALL),
        ({"height": None}, Reason.SIDE_SMALL),
        ({"width": 0}, Reason.SIDE_SMALL),
        ({"width": -100}, Reason.SIDE_SMALL),
        ({"width": 63}, Reason.SIDE_SMALL),
        ({"width": 64, "height": 64}, None),
        ({"width": 240, "height": 80}, None),
        ({"width": 241, "height": 80}, Reason.ASPECT_EXTREME),
        ({"width": 80, "height": 241}, Reason.ASPECT_EXTREME),
        ({"caption": None}, Reason.CAPTION_EMPTY),
        ({"caption": ""}, Reason.CAPTION_EMPTY),
        ({"caption": " \n\t\u3000"}, Reason.CAPTION_EMPTY),
        ({"caption": "x" * 20}, None),
        ({"caption": "x" * 21}, Reason.CAPTION_LONG),
        ({"caption": "<script>alert(1)"}, None),
        ({"caption": "青い背景の赤い円"}, None),
        ({"caption": "円" * 20}, None),
    ],
)
def test_each_rule(changes: dict[str, Any], reason: Reason | None) -> None:
    assert reason_of(**changes) == reason


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.7, 0.9])
def test_the_limit_itself_is_refused_in_both_precisions(limit: float) -> None:
    config = LIMITS.model_copy(update={"max_punsafe": limit})
    assert reason_of(config, punsafe=limit) == Reason.PUNSAFE_HIGH
    assert reason_of(config, punsafe=float(np.float32(limit))) == Reason.PUNSAFE_HIGH


def test_rules_without_a_limit_do_not_apply() -> None:
    config = SelectConfig(max_pwatermark=None, min_side_px=64, min_caption_chars=0)
    assert reason_of(config, pwatermark=None, similarity=None, aesthetic=math.nan, caption=None) is None


def test_the_first_rule_gives_the_reason() -> None:
    bad: dict[str, Any] = {"punsafe": 0.5, "pwatermark": 0.9, "width": 1, "caption": ""}
    fixed = [reason_of(**bad)]
    for name in ("punsafe", "pwatermark", "width", "caption"):
        bad.pop(name)
        fixed.append(reason_of(**bad))
    order = [Reason.PUNSAFE_HIGH, Reason.PWATERMARK_HIGH, Reason.SIDE_SMALL, Reason.CAPTION_EMPTY, None]
    assert fixed == order


def test_details_say_what_was_refused() -> None:
    rows = [{"width": None}, {"width": 10}, {"punsafe": 0.5}, {"punsafe": None}, {"caption": "x" * 21}, {}]
    verdict = judge(frame(*(GOOD | row for row in rows)), LIMITS)
    assert verdict["detail"].to_list() == ["missing", "10x80", "0.5", "missing", "21 characters", None]


@pytest.mark.parametrize(
    ("caption", "is_refused"),
    [
        ("Image", True),
        ("image 12", True),
        (" no  image available. ", True),
        ("IMG_2041.jpg", True),
        ("DSC00012", True),
        ("photo-1.jpeg", True),
        ("https://a.example/x", True),
        ("12 / 34 — !!", True),
        ("😀", True),
        ("Click to enlarge!", True),
        ("image of a dog", False),
        ("a photo", False),
        ("犬", False),
        ("dog.", False),
        ("a.jpg of a dog", False),
        ("P", False),
    ],
)
def test_boilerplate(caption: str, is_refused: bool) -> None:
    config = LIMITS.model_copy(update={"drop_boilerplate": True, "max_caption_chars": 100})
    assert (reason_of(config, caption=caption) == Reason.CAPTION_BOILERPLATE) is is_refused


@pytest.mark.parametrize(
    ("language", "reason"),
    [("en", None), (" EN", None), ("de", Reason.LANGUAGE_REFUSED), (None, Reason.LANGUAGE_REFUSED)],
)
def test_languages(language: str | None, reason: Reason | None) -> None:
    assert reason_of(LIMITS.model_copy(update={"languages": ("En", "fr")}), language=language) == reason
    assert reason_of(LIMITS, language=language) is None


@pytest.mark.parametrize(
    ("url", "is_blocked"),
    [
        ("http://bad.example/x", True),
        ("https://user:pw@WWW.Bad.Example.:8080/x", True),
        ("//bad.example?x", True),
        ("http://notbad.example/x", False),
        ("http://a.example/http://bad.example/", False),
        ("http://bad.example.org/", False),
        ("http://[::1]:80/", True),
    ],
)
def test_blocked_hosts(url: str, is_blocked: bool) -> None:
    blocked = BlockLists(hosts=frozenset({"bad.example", "[::1]"}))
    verdict = judge(frame(GOOD | {"url": url}), LIMITS, blocked).row(0)
    assert verdict == ((Reason.HOST_BLOCKED, "listed") if is_blocked else (None, None))


def test_blocked_urls_and_hashes() -> None:
    blocked = BlockLists(urls=frozenset({"http://x/"}), hashes=frozenset({"ab" * 16, "cd" * 32}))
    rows = [{"url": " http://x/"}, {"expected_md5": "ab" * 16}, {"expected_sha256": "cd" * 32}, {}]
    verdict = judge(frame(*(GOOD | row for row in rows)), LIMITS, blocked)["reason"].to_list()
    assert verdict == [Reason.URL_BLOCKED, Reason.HASH_BLOCKED, Reason.HASH_BLOCKED, None]


def test_no_rows() -> None:
    assert judge(frame(), LIMITS).shape == (0, 2)


scores = st.none() | st.floats(width=32) | st.floats(0, 1) | st.sampled_from([0.1, 0.0999999999, 0.8, 0.0])
sides = st.none() | st.integers(-(2**31), 2**31 - 1) | st.integers(60, 300)
any_rows = st.lists(
    st.fixed_dictionaries(
        {
            "url": st.none() | st.text(max_size=5) | st.just("http://a.example/"),
            "caption": st.none() | st.text(max_size=25),
            "width": sides,
            "height": sides,
            "similarity": scores,
            "punsafe": scores,
            "pwatermark": scores,
            "aesthetic": scores,
            "is_text": st.just(True),
        }
    ),
    max_size=20,
)


@settings(deadline=None, max_examples=60)
@given(rows=any_rows)
def test_every_row_is_kept_or_has_a_reason_and_no_unsafe_one_is_kept(rows: list[dict[str, Any]]) -> None:
    verdict = judge(frame(*rows), LIMITS)
    assert verdict.height == len(rows)
    for row, (reason, detail) in zip(rows, verdict.iter_rows(), strict=True):
        if reason is not None:
            assert Reason(reason)
            assert detail is not None
            continue
        assert row["punsafe"] is not None
        assert row["punsafe"] < LIMITS.max_punsafe
        assert np.float32(row["punsafe"]) < np.float32(LIMITS.max_punsafe)
        assert row["pwatermark"] < 0.8
        assert min(row["width"], row["height"]) >= LIMITS.min_side_px
        assert row["url"].strip()
        assert row["caption"].strip()


@settings(deadline=None, max_examples=50)
@given(rows=any_rows, data=st.data())
def test_a_row_is_judged_alone(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """So the order of rows and what stands beside them change nothing."""
    shuffled = data.draw(st.permutations(range(len(rows))))
    whole = judge(frame(*rows), LIMITS).rows()
    assert judge(frame(*(rows[i] for i in shuffled)), LIMITS).rows() == [whole[i] for i in shuffled]
    assert [row for single in rows for row in judge(frame(single), LIMITS).rows()] == whole
