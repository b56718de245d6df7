"""Licences are recognised by their titles, not by what their texts mention."""

from pathlib import Path

import pytest

from training.licenses import NO_LICENSE, recognize_license


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ("CreativeML Open RAIL++-M License\ndated November 24, 2022\n\nSection I: PREAMBLE", "openrail++"),
        ("CreativeML Open RAIL++-M License dated July 26, 2023", "openrail++"),
        (
            "Copyright (c) 2022 Stability AI and contributors\n\nCreativeML Open RAIL++-M License\n"
            "dated November 24, 2022",
            "openrail++",
        ),
        ("Copyright (c) 2022 Robin Rombach\n\nCreativeML Open RAIL-M\ndated August 22, 2022", "creativeml-openrail-m"),
        ("BigScience Open RAIL-M License\ndated August 18, 2022", "bigscience-openrail-m"),
        ("# Open RAIL-M\n", "openrail"),
        ("                 Apache License\n           Version 2.0, January 2004\n", "apache-2.0"),
        ("MIT License\n\nCopyright (c) 2022 Somebody", "mit"),
        ("The MIT License\n", "mit"),
        (
            "Copyright 2020 A. N.\n\nPermission is hereby granted, free of charge, to any person obtaining a copy of",
            "mit",
        ),
        ("Creative Commons Legal Code\n\nCC0 1.0 Universal\n", "cc0-1.0"),
        ("STABILITY AI COMMUNITY LICENSE AGREEMENT\nLast Updated: July 5, 2024", "other"),
        ("My licence\n\nIt is not the MIT License, nor the Apache License, Version 2.0.", "other"),
        ("\n\n  \n", "unknown"),
        ("", "unknown"),
    ],
)
def test_titles(tmp_path: Path, text: str, identifier: str):
    (tmp_path / "LICENSE").write_text(text)
    assert recognize_license(tmp_path / "LICENSE").id == identifier


def test_another_licence_is_named_by_its_first_line(tmp_path: Path):
    (tmp_path / "LICENSE").write_bytes(b"\n** My  licence **\n\xff\n")
    found = recognize_license(tmp_path / "LICENSE")
    assert (found.name, found.is_there) == ("My licence", True)


def test_no_file_is_no_licence(tmp_path: Path):
    assert recognize_license(tmp_path / "LICENSE") is NO_LICENSE
    assert not NO_LICENSE.is_there


def test_the_shipped_weights_have_one():
    shipped = Path(__file__).parents[2] / "model" / "tiny" / "weights" / "LICENSE"
    assert recognize_license(shipped).id == "apache-2.0"
