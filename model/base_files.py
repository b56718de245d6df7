"""Which files of a base model are read, and which part each one is. Names only: no torch, and no file is opened.

The same choice is made of a local folder, of a prefix in an object store, and again when the weights are converted; so
what was fetched, what was hashed and what is read are the same files.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

WEIGHT_SUFFIXES: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Endings of weight files, the preferred one first."""

PART_CONFIGS: Final[dict[str, str]] = {
    "unet": "config.json",
    "vae": "config.json",
    "open_clip": "open_clip_config.json",
    "text_encoder": "config.json",
    "unet_ema": "config.json",
    "scheduler": "scheduler_config.json",
}
"""The folders of a base, and the config in each."""

_STEMS: Final[dict[str, tuple[str, ...]]] = {
    "unet": ("diffusion_pytorch_model",),
    "unet_ema": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "open_clip": ("open_clip_model", "open_clip_pytorch_model"),
    "text_encoder": ("model", "pytorch_model"),
}
_CANONICAL: Final = ("unet", "vae", "open_clip")
_LOADED: Final = {
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "open_clip/open_clip_model.safetensors",
    "unet_ema/diffusion_pytorch_model.safetensors",
}
"""The weights that are read as they are; under any other name they are converted first."""
_VARIANTS: Final = ("", "fp32", "fp16", "bf16")  # as published, or in this order of preference
_LICENSE: Final = re.compile(r"licen[sc]e([-_.].*)?", re.IGNORECASE)

Layout = Literal["canonical", "diffusers", "single"]


@dataclass(frozen=True)
class BaseFiles:
    """The files of a base, by names relative to its folder, with forward slashes.

    Attributes:
        layout: `canonical`: what Lacuna reads, as it is; `diffusers`: a folder for each part; `single`: one file.
        weights: part (`unet`, `unet_ema`, `vae`, `text_encoder`, `open_clip`, or `single`) → its file, or its index.
        configs: part → its config; `yaml` → the CompVis config beside a single file.
        license: the licence's file, if there is one.
        names: all of these, and the shards of the indices; sorted.
    """

    layout: Layout
    weights: Mapping[str, str]
    configs: Mapping[str, str]
    license: str | None
    names: tuple[str, ...] = field(default=())


def is_weight_file(name: str) -> bool:
    """Whether a name ends as weight files do."""
    return name.endswith(WEIGHT_SUFFIXES)


def list_names(folder: Path) -> list[str]:
    """The names in a folder that `choose_files` may want: files in it, and in the folders of a base's parts."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    for part in PART_CONFIGS:
        if (folder / part).is_dir():
            names += [f"{part}/{path.name}" for path in (folder / part).iterdir() if path.is_file()]
    return sorted(names)


def local_files(source: Path) -> tuple[Path, BaseFiles]:
    """Which files of a local source are read: the folder that they lie in, and their names.

    Raises:
        ValueError: It is not there, or something is missing.
    """
    if source.is_dir():
        return source, choose_files(list_names(source), str(source))
    if not source.is_file():
        raise ValueError(f"model.base: {str(source)!r} is neither a folder nor a file")
    if not is_weight_file(source.name):
        raise ValueError(
            f"model.base: {str(source)!r} is no weight file; give a .safetensors or .ckpt file, or a folder"
        )
    return source.parent, choose_files(list_names(source.parent), str(source), single=source.name)


def choose_files(names: Iterable[str], where: str, *, single: str | None = None) -> BaseFiles:
    """Chooses among names.

    Of several variants of one part the one without a name is preferred, then fp32, fp16, bf16; of several formats
    safetensors.

    Args:
        names: all files, relative to the base's folder; of no interest but to this function.
        where: the folder, for messages.
        single: the weight file that the user named, if it was one; then the others only lie beside it.

    Raises:
        ValueError: one line that says what is missing.
    """
    known = set(names)
    configs = {part: f"{part}/{name}" for part, name in PART_CONFIGS.items() if f"{part}/{name}" in known}
    licenses = sorted((name for name in known if _LICENSE.fullmatch(name)), key=lambda name: (len(name), name))
    license_ = licenses[0] if licenses else None
    is_bare = any("/" not in name and is_weight_file(name) for name in known) and _weights_of("unet", known) is None
    if single is None and not is_bare and {"unet", "vae"} <= set(configs):
        return _folders(known, configs, license_, where)
    single = single or _only_weight_file(known, where)
    stem = single.rpartition(".")[0]
    yaml = next((f"{stem}{suffix}" for suffix in (".yaml", ".yml") if f"{stem}{suffix}" in known), None)
    if yaml is not None:
        configs["yaml"] = yaml
    return BaseFiles("single", {"single": single}, configs, license_, _sorted([single], configs, license_))


def _folders(known: Collection[str], configs: dict[str, str], license_: str | None, where: str) -> BaseFiles:
    weights = {part: name for part in _STEMS if (name := _weights_of(part, known)) is not None}
    read = [weights.get(part) for part in (*_CANONICAL, *(["unet_ema"] if "unet_ema" in weights else []))]
    if all(part in configs for part in _CANONICAL) and _LOADED.issuperset(read):
        inside = [name for name in known if name.partition("/")[0] in (*_CANONICAL, "unet_ema", "scheduler")]
        inside = [name for name in inside if name.endswith((".json", ".safetensors"))]
        return BaseFiles("canonical", weights, configs, license_, _sorted(inside, configs, license_))
    for part in ("unet", "vae"):
        if part not in weights:
            raise ValueError(f"model.base: {where!r} has no weights in {part}/; {_expected(part)}")
    text = "open_clip" if "open_clip" in weights else "text_encoder"
    if text not in weights:
        raise ValueError(f"model.base: {where!r} has no text encoder; {_expected('text_encoder')} or open_clip/")
    unused = "text_encoder" if text == "open_clip" else "open_clip"
    weights.pop(unused, None)
    configs.pop(unused, None)
    files = [file for name in weights.values() for file in _with_shards(name, known, where)]
    return BaseFiles("diffusers", weights, configs, license_, _sorted(files, configs, license_))


def _weights_of(part: str, known: Collection[str]) -> str | None:
    """The preferred weight file, or index, in the folder of a part."""
    found: list[tuple[int, int, bool, str]] = []
    for name in known:
        folder, _, file = name.partition("/")
        if folder != part:
            continue
        for stem in _STEMS[part]:
            match = re.fullmatch(
                rf"{stem}(\.(?P<early>\w+))?(?P<suffix>\.safetensors|\.bin)(?P<index>\.index(\.(?P<late>\w+))?\.json)?",
                file,
            )
            variant = "" if match is None else match["early"] or match["late"] or ""
            if match is not None and variant in _VARIANTS:
                suffix = WEIGHT_SUFFIXES.index(match["suffix"])
                found.append((_VARIANTS.index(variant), suffix, match["index"] is not None, name))
    return min(found)[-1] if found else None


def _with_shards(name: str, known: Collection[str], where: str) -> list[str]:
    """The file, and if it is an index, all shards that may be its own."""
    if not name.endswith(".json"):
        return [name]
    stem, suffix = name.partition(".")[0], _suffix_of(name)
    shards = [n for n in known if re.fullmatch(rf"{re.escape(stem)}[\w.]*-\d+-of-\d+[\w.]*{re.escape(suffix)}", n)]
    if not shards:
        raise ValueError(f"model.base: {where!r} has the index {name} and none of its shards; download them, too")
    return [name, *shards]


def _suffix_of(name: str) -> str:
    return ".safetensors" if ".safetensors" in name else name[name.rfind(".") :] if ".bin" not in name else ".bin"


def _only_weight_file(known: Collection[str], where: str) -> str:
    """The weight file of a folder that is no diffusers folder."""
    found = sorted(name for name in known if "/" not in name and is_weight_file(name))
    if len({name.rpartition(".")[0] for name in found}) > 1:
        raise ValueError(f"model.base: {where!r} holds {len(found)} weight files; name one, such as {found[0]}")
    if not found:
        missing = [f"{part}/{PART_CONFIGS[part]}" for part in _CANONICAL if f"{part}/{PART_CONFIGS[part]}" not in known]
        raise ValueError(
            f"model.base: {where!r} has no {', '.join(missing)}; give 'tiny', a diffusers folder, a .safetensors or "
            ".ckpt file, or an s3:// URI of one"
        )
    return min(found, key=lambda name: WEIGHT_SUFFIXES.index(f".{name.rpartition('.')[2]}"))


def _expected(part: str) -> str:
    stems = " or ".join(f"{stem}.safetensors" for stem in _STEMS[part])
    return f"expected {part}/{stems} (or .bin, or an index with its shards)"


def _sorted(names: Iterable[str], configs: Mapping[str, str], license_: str | None) -> tuple[str, ...]:
    return tuple(sorted({*names, *configs.values(), *([license_] if license_ else [])}))
