"""Licences of weights: which one a file holds, in the words of Hugging Face's model cards.

Only a licence's own title counts, at the top of its file: texts that merely mention another licence do not.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_KNOWN: Final = (
    (r"creativeml open ?rail\+\+[- ]m", "openrail++", "CreativeML Open RAIL++-M"),
    (r"creativeml open ?rail[- ]?m", "creativeml-openrail-m", "CreativeML Open RAIL-M"),
    (r"bigscience open ?rail[- ]?m", "bigscience-openrail-m", "BigScience Open RAIL-M"),
    (r"open ?rail\+\+[- ]m", "openrail++", "Open RAIL++-M"),
    (r"open ?rail[- ]?m", "openrail", "Open RAIL-M"),
    (r"apache license,? version 2\.0", "apache-2.0", "Apache License 2.0"),
    (r"mit license", "mit", "MIT License"),
    (r"permission is hereby granted, free of charge, to any person obtaining a copy", "mit", "MIT License"),
    (r"(creative commons )?(legal code )?cc0 1\.0 universal", "cc0-1.0", "CC0 1.0 Universal"),
    (r"(creative commons )?attribution 4\.0 international", "cc-by-4.0", "Creative Commons Attribution 4.0"),
)
_TITLE_CHARS: Final = 240
_MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class License:
    """A licence as a model card names it.

    Attributes:
        id: Hugging Face's identifier (`openrail++`, `apache-2.0`, …); `other` for one that is not known here, `unknown`
            where there is none.
        name: for people.
    """

    id: str
    name: str

    @property
    def is_there(self) -> bool:
        """Whether the weights came with a licence."""
        return self.id != "unknown"


NO_LICENSE: Final = License(id="unknown", name="none")


def recognize_license(path: Path) -> License:
    """Which licence a file holds.

    Args:
        path: the file; it need not exist.

    Returns:
        `NO_LICENSE` if the file is missing or blank; one with the id `other`, named by the text's first line, if the
        title is none of those known here.
    """
    if not path.is_file():
        return NO_LICENSE
    with path.open("rb") as file:
        text = file.read(_MAX_BYTES).decode("utf-8", "replace")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    title = " ".join(line.strip("#*= ") for line in lines if line.strip("#*=- "))[:_TITLE_CHARS].strip()
    if not title:
        return NO_LICENSE
    for pattern, identifier, name in _KNOWN:
        # A copyright line may stand above the MIT licence's words; elsewhere the title comes first.
        if re.match(rf"(copyright\b.{{0,160}}?)?(the )?{pattern}", title, re.IGNORECASE):
            return License(id=identifier, name=name)
    first = next(line.strip("#*= ") for line in lines if line.strip("#*=- "))
    return License(id="other", name=first[:80])
