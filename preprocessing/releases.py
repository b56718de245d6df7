"""LAION's releases: which of them were withdrawn."""

import re

from preprocessing.contracts.config import SourceConfig

# LAION took these down in December 2023; Re-LAION replaces them.
_WITHDRAWN = re.compile(
    r"(?<![a-z0-9])(?<!re-)("
    r"laion-?(?:2b|1b|5b|400m|400-m|high-res(?:olution)?|aesthetics?|art|pop)[a-z0-9-]*"
    r"|improved-aesthetics[a-z0-9-]*"
    r")"
)


def withdrawn_names(source: SourceConfig) -> list[str]:
    """Withdrawn releases that a source names.

    ``source.dataset`` decides where it is given; else the names of subsets and the paths are looked through.
    """
    said = [source.dataset] if source.dataset is not None else [*source.subsets, *source.patterns]
    found: set[str] = set()
    for text in said:
        plain = re.sub(r"[_ .%]+", "-", text.lower())
        found.update(match[1].strip("-") for match in _WITHDRAWN.finditer(plain))
    return sorted(found)


def check_withdrawn(source: SourceConfig) -> list[str]:
    """The withdrawn releases that the user means to use.

    Raises:
        ValueError: There are some, and nobody acknowledged it.
    """
    found = withdrawn_names(source)
    if found and not source.acknowledge_withdrawn:
        raise ValueError(
            f"source.metadata: {', '.join(found)} was withdrawn by LAION, since it links to illegal pictures; "
            "use a Re-LAION release, or set source.acknowledge_withdrawn=true (or source.dataset, if it is another set)"
        )
    return found
