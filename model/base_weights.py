"""From published weights, in any form, to the one folder that every part of Lacuna reads.

    base/  unet/ vae/        config.json, diffusion_pytorch_model.safetensors: diffusers' names
           unet_ema/         as unet/, and ema.json, if the source holds a moving average
           open_clip/        open_clip_config.json, open_clip_model.safetensors
           scheduler/        scheduler_config.json, if the source states what the UNet predicts
           LICENSE           the source's own, if there is one
           base.json         where all of this came from

The conversion renames; it never rounds: dtypes stay. The same weights give the same bytes of `unet/` and `vae/`,
whichever form they came in. A UNet of four input channels stays one: the training widens it, and its average. Tensors
pass through memory one at a time.

Source: Stability-AI/stablediffusion `ldm/models/diffusion/ddpm.py`, `ldm/modules/ema.py`; diffusers' own folders.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from model import base_configs, compvis
from model.base_files import BaseFiles, local_files
from model.base_kinds import EXPECTED, Kind, recognize
from model.compvis import some_of
from model.encoders import CLIP_CONFIG_NAME, CLIP_WEIGHTS_NAME
from model.safetensors_writer import save_safetensors
from model.specs import PredictionType
from model.weight_files import Weights, open_weights, read_json
from model.weights import WEIGHTS_NAME, write_json

BASE_NAME: Final = "base.json"
EMA_NAME: Final = "ema.json"
FORMAT_VERSION: Final = 1

_SD2_TEXT_WIDTH: Final = 1024
_SD2_TEXT_BLOCKS: Final = 23  # that conditioning reads, of the 24 of ViT-H-14
_FLOATS: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_OLD_VAE_ATTENTION: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert_base(
    source: Path | str, target: Path | str, *, name: str | None = None, sha256: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Converts published weights into a new base folder.

    Args:
        source: a diffusers folder; a `.safetensors` or `.ckpt` file with CompVis' names, beside which a yaml, diffusers
            configs and a licence may lie; a folder with one such file; a folder that is a base folder already.
        target: absent; what is there when this raises is to be thrown away.
        name: what to call the source in `base.json`; None for its path.
        sha256: of the source's files, by name, to be written down.

    Returns:
        what `base.json` holds: `source`, `sha256`, `recognized_as`, `prediction_type` (or None), `ema_num_updates` (or
        None), `notes`.

    Raises:
        WeightFileError: a file is damaged, malicious, or no weights.
        ValueError: the weights are of another model, or incomplete; says what they are and what was expected.
    """
    source, target = Path(source), Path(target)
    folder, files = local_files(source)
    target.mkdir(parents=True)
    with ExitStack() as stack:
        if files.layout == "canonical":
            found = _copy_canonical(folder, files, target)
        elif files.layout == "diffusers":
            found = _convert_folders(_Folder(folder, files, stack), target)
        else:
            found = _convert_single(_Folder(folder, files, stack), target)
    if files.license is not None:
        shutil.copyfile(folder / files.license, target / "LICENSE")
    else:
        found["notes"].append("no licence came with these weights")
    record = {
        "format_version": FORMAT_VERSION,
        "source": name or str(source),
        "layout": files.layout,
        "sha256": dict(sorted((sha256 or {}).items())),
        "license": files.license,
        **found,
    }
    write_json(target / BASE_NAME, record)
    return record


@final
class _Folder:
    """The files of a source, opened on demand and closed together."""

    def __init__(self, path: Path, files: BaseFiles, stack: ExitStack) -> None:
        self.path, self.files, self._stack = path, files, stack

    def weights(self, part: str) -> Weights:
        return self._stack.enter_context(open_weights(self.path / self.files.weights[part]))

    def config(self, part: str) -> dict[str, Any] | None:
        name = self.files.configs.get(part)
        return None if name is None else read_json(self.path / name)

    def where(self, part: str) -> str:
        return str(self.path / (self.files.weights.get(part) or self.files.configs[part]))

    def config_where(self, part: str) -> str:
        return str(self.path / self.files.configs[part])

    def prediction_type(self) -> PredictionType | None:
        """What the scheduler's config states, or the yaml; both, if they are there, must say the same."""
        stated = {}
        if "scheduler" in self.files.configs:
            path = self.path / self.files.configs["scheduler"]
            stated[path.name] = base_configs.stated_prediction_type(path)
        if "yaml" in self.files.configs:
            stated[self.files.configs["yaml"]] = self.yaml().get("prediction_type")
        found = {name: value for name, value in stated.items() if value is not None}
        if len(set(found.values())) > 1:
            both = " and ".join(f"{name} says {value}" for name, value in found.items())
            raise ValueError(f"{self.path}: {both}; remove the wrong one")
        return next(iter(found.values()), None)

    def yaml(self) -> dict[str, Any]:
        name = self.files.configs.get("yaml")
        return {} if name is None else base_configs.read_compvis_yaml(self.path / name)


# ------------------------------------------------------------------------------------------------------------- folders


def _copy_canonical(folder: Path, files: BaseFiles, target: Path) -> dict[str, Any]:
    for name in files.names:
        if name != files.license:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)
    stated = None
    if "scheduler" in files.configs:
        stated = base_configs.stated_prediction_type(folder / files.configs["scheduler"])
    before = read_json(folder / BASE_NAME) if (folder / BASE_NAME).is_file() else {}
    recognized = before.get("recognized_as", "a base folder")
    return _found(str(recognized), stated, before.get("ema_num_updates"), [])


def _convert_folders(source: _Folder, target: Path) -> dict[str, Any]:
    kinds = {
        part: _recognize_part(source, part, expected)
        for part, expected in (("unet", "unet"), ("vae", "vae"), ("open_clip", "text"), ("text_encoder", "text"))
        if part in source.files.weights
    }
    notes: list[str] = []
    config = base_configs.unet_config(_present(source.config("unet")), source.config_where("unet"))
    shapes = base_configs.unet_shapes(config)
    _write_part(target / "unet", config, _checked(source.weights("unet"), shapes, source.where("unet")))
    num_updates = None
    if "unet_ema" in source.files.weights:
        declared = source.config("unet_ema") or {}
        _write_part(target / "unet_ema", config, _checked(source.weights("unet_ema"), shapes, source.where("unet_ema")))
        num_updates = _write_ema(target, declared.get("optimization_step"))
    config = base_configs.vae_config(_present(source.config("vae")), source.config_where("vae"))
    vae = _Renamed(source.weights("vae"), _current_vae_name)
    _write_part(target / "vae", config, _checked(vae, base_configs.vae_shapes(config), source.where("vae")))
    if "open_clip" in source.files.weights:
        notes += _write_open_clip(source, target)
    else:
        notes += _write_from_transformers(source, target)
    return _finish(source, target, f"a diffusers folder with {kinds['unet'].name}", num_updates, notes)


def _recognize_part(source: _Folder, part: str, expected: str) -> Kind:
    weights = source.weights(part)
    kind = recognize(weights, weights.shape)
    if not kind.is_usable or kind.parts != {expected}:
        raise ValueError(f"{source.where(part)}: this is {kind.name}; {EXPECTED}")
    return kind


def _current_vae_name(key: str) -> str:
    """Diffusers' present name of a parameter; folders from before its version 0.18 name the attention otherwise."""
    owner, _, kind = key.rpartition(".")
    module, _, last = owner.rpartition(".")
    if ".attentions." in key and last in _OLD_VAE_ATTENTION:
        return f"{module}.{_OLD_VAE_ATTENTION[last]}.{kind}"
    return key


# --------------------------------------------------------------------------------------------------------- single file


def _convert_single(source: _Folder, target: Path) -> dict[str, Any]:
    weights, where = source.weights("single"), source.where("single")
    kind = recognize(weights, weights.shape)
    if not kind.is_usable or kind.parts != {"unet", "vae", "text"}:
        raise ValueError(f"{where}: this is {kind.name}; {EXPECTED}")
    unet, vae, text = (_Prefixed(weights, p) for p in (compvis.UNET_PREFIX, compvis.VAE_PREFIX, compvis.TEXT_PREFIX))
    vae = _Chosen(vae, [key for key in vae if not key.startswith("loss.")])
    unknown = [key for key in weights if _is_unknown(key)]
    if unknown:
        raise ValueError(f"{where}: {some_of(unknown, 'keys belong to no part of Stable Diffusion 2')}")
    stated = source.yaml()
    config = _single_unet_config(source, unet, stated)
    _write_part(target / "unet", config, _renamed_unet(unet, config, where))
    num_updates = _write_single_ema(weights, unet, config, target, where)
    config = _single_vae_config(source, vae, stated)
    state = _from_compvis(compvis.vae_from_compvis, vae, config, where)
    _write_part(target / "vae", config, _floats_only(state, where))
    notes = _write_single_text(source, text, target)
    return _finish(source, target, f"a single file with {kind.name}", num_updates, notes)


def _is_unknown(key: str) -> bool:
    prefixes = (compvis.UNET_PREFIX, compvis.VAE_PREFIX, compvis.TEXT_PREFIX)
    return not key.startswith(prefixes) and compvis.named_extra(key) is None


def _single_unet_config(source: _Folder, unet: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Any]:
    declared = source.config("unet")
    if declared is not None:
        return base_configs.unet_config(declared, source.config_where("unet"))
    head_channels = stated.get("head_channels", base_configs.HEAD_CHANNELS)
    try:
        return base_configs.infer_unet_config(list(unet), _shape_of(unet), head_channels=head_channels)
    except ValueError as error:
        raise ValueError(f"{source.where('single')}: {error}") from None


def _single_vae_config(source: _Folder, vae: Mapping[str, Tensor], stated: Mapping[str, Any]) -> dict[str, Any]:
    declared = source.config("vae")
    if declared is not None:
        return base_configs.vae_config(declared, source.config_where("vae"))
    try:
        return base_configs.infer_vae_config(list(vae), _shape_of(vae), scaling_factor=stated.get("scaling_factor"))
    except ValueError as error:
        raise ValueError(f"{source.where('single')}: {error}") from None


def _renamed_unet(unet: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Mapping[str, Tensor]:
    return _floats_only(_from_compvis(compvis.unet_from_compvis, unet, config, where), where)


def _from_compvis(rename: Any, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    try:
        return rename(state, config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _write_single_ema(
    weights: Weights, unet: Mapping[str, Tensor], config: Mapping[str, Any], target: Path, where: str
) -> int | None:
    """Writes `unet_ema/` if the file holds a moving average; returns how often it had been updated, if it says so."""
    names = {key: compvis.ema_name(compvis.UNET_PREFIX + key) for key in unet}
    state = {compvis.EMA_PREFIX + name for name in ("decay", "num_updates")}
    there = {key for key in weights if key.startswith(compvis.EMA_PREFIX)} - state
    if not there:
        return None
    wrong = sorted(there ^ set(names.values()))
    if wrong:
        raise ValueError(
            f"{where}: its moving average is not of its UNet: {some_of(wrong, 'keys are only on one side')}"
        )
    average = _Renamed(weights, {name: key for key, name in names.items()}.get, only=set(names.values()))
    _write_part(target / "unet_ema", config, _renamed_unet(average, config, where))
    counter = compvis.EMA_PREFIX + "num_updates"
    return _write_ema(target, int(weights[counter]) if counter in weights and weights[counter].numel() == 1 else None)


# ---------------------------------------------------------------------------------------------------------------- text


def _write_open_clip(source: _Folder, target: Path) -> list[str]:
    """From open_clip's own file, whole."""
    weights, where = source.weights("open_clip"), source.where("open_clip")
    state = _Chosen(weights, [key for key in weights if key != "attn_mask"])
    declared = source.config("open_clip")
    if declared is None:
        _check_is_vit_h_14(weights, where)
        declared = {"model_cfg": base_configs.VIT_H_14}
    _floats_only(_Chosen(state, [key for key in state if key != "token_embedding.ids"]), where)  # ids: compact
    _write_text(target, declared, state)
    return []


def _check_is_vit_h_14(weights: Weights, where: str) -> None:
    known = base_configs.VIT_H_14
    wanted = {
        "token_embedding.weight": (known["text_cfg"]["vocab_size"], known["text_cfg"]["width"]),
        "visual.conv1.weight": (known["vision_cfg"]["width"], 3, 14, 14),
        f"transformer.resblocks.{known['text_cfg']['layers'] - 1}.ln_1.weight": (known["text_cfg"]["width"],),
    }
    if any(key not in weights or weights.shape(key) != shape for key, shape in wanted.items()):
        raise ValueError(f"{where}: this is not ViT-H-14, so {CLIP_CONFIG_NAME} must lie beside it")


def _write_from_transformers(source: _Folder, target: Path) -> list[str]:
    """From diffusers' text encoder, whose last block is the penultimate one of open_clip's tower."""
    where = source.where("text_encoder")
    declared = _present(source.config("text_encoder"))
    declared = declared.get("text_config", declared)
    weights = _floats_only(_used_of_transformers(source.weights("text_encoder")), where)
    try:
        state = compvis.clip_text_from_transformers(weights)
        num_blocks = compvis.num_text_blocks(state)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _check_transformers_config(declared, state, num_blocks, source.config_where("text_encoder"))
    return _write_bare_text(
        target,
        state,
        num_blocks,
        heads=declared.get("num_attention_heads"),
        quick_gelu=declared.get("hidden_act") == "quick_gelu",
        where=where,
    )


def _check_transformers_config(
    declared: Mapping[str, Any], state: Mapping[str, Tensor], num_blocks: int, where: str
) -> None:
    width = state["token_embedding.weight"].shape[1]
    for key, value, known in (
        ("num_hidden_layers", num_blocks, (num_blocks,)),
        ("hidden_size", width, (width,)),
        ("hidden_act", "gelu", ("gelu", "quick_gelu")),
        ("layer_norm_eps", 1e-5, (1e-5,)),
    ):
        if declared.get(key, value) not in known:
            raise ValueError(f"{where}: its {key} is {declared[key]!r}, and the weights are of {value!r}")


def _write_single_text(source: _Folder, text: Mapping[str, Tensor], target: Path) -> list[str]:
    """From a single file, whose image tower was dropped: then the last block serves nothing, and is dropped, too."""
    where = source.where("single")
    heads, quick_gelu = None, False
    if (declared := source.config("open_clip")) is not None:
        model_cfg = declared.get("model_cfg", {})
        heads, quick_gelu = model_cfg.get("text_cfg", {}).get("heads"), bool(model_cfg.get("quick_gelu"))
    elif (declared := source.config("text_encoder")) is not None:
        heads, quick_gelu = declared.get("num_attention_heads"), declared.get("hidden_act") == "quick_gelu"
    try:
        num_blocks = compvis.num_text_blocks(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    num_used = num_blocks - 1 if "text_projection" in text else num_blocks
    if (width := text["ln_final.weight"].shape[0] if "ln_final.weight" in text else 0) == _SD2_TEXT_WIDTH:
        if num_blocks not in (_SD2_TEXT_BLOCKS, _SD2_TEXT_BLOCKS + 1):
            raise ValueError(f"{where}: a text tower of width {width} with {num_blocks} blocks; SD2's has 24 or 23")
        num_used = _SD2_TEXT_BLOCKS
    last = f"transformer.resblocks.{num_used}."
    unused = [
        key for key in text if key in ("attn_mask", "logit_scale", "text_projection") or key.startswith("visual.")
    ]
    used = _Chosen(text, [key for key in text if key not in unused and not key.startswith(last)])
    return _write_bare_text(target, used, num_used, heads=heads, quick_gelu=quick_gelu, where=where)


def _write_bare_text(
    target: Path, state: Mapping[str, Tensor], num_used: int, *, heads: int | None, quick_gelu: bool, where: str
) -> list[str]:
    """Writes a tower without its last block, which conditioning does not read."""
    try:
        compvis.clip_text_to_transformers(_Shapes(state), num_used)  # complains of any key that is missing or too many
        shape = _shape_of(state)
        model_cfg = base_configs.text_config(num_used + 1, shape, heads=heads, quick_gelu=quick_gelu)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _write_text(target, {"model_cfg": model_cfg}, _floats_only(state, where))
    return ["the text encoder has no image tower: validation cannot compare pictures with captions"]


def _write_text(target: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    write_json(target / "open_clip" / CLIP_CONFIG_NAME, config)
    save_safetensors(target / "open_clip" / CLIP_WEIGHTS_NAME, state)


# ------------------------------------------------------------------------------------------------------------- writing


def _write_part(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    write_json(folder / "config.json", config)
    save_safetensors(folder / WEIGHTS_NAME, state)


def _write_ema(target: Path, num_updates: Any) -> int | None:
    """Notes in `unet_ema/` how mature the average is: it decides how fast the training's own moves away from it."""
    known = num_updates if type(num_updates) is int and num_updates >= 0 else None
    write_json(target / "unet_ema" / EMA_NAME, {"num_updates": known})
    return known


def _finish(
    source: _Folder, target: Path, recognized: str, num_updates: int | None, notes: list[str]
) -> dict[str, Any]:
    stated = source.prediction_type()
    _check_text_width(target)
    if stated is not None:
        declared = source.config("scheduler") or {}
        write_json(target / "scheduler" / "scheduler_config.json", declared | {"prediction_type": stated})
    return _found(recognized, stated, num_updates, notes)


def _check_text_width(target: Path) -> None:
    reads = read_json(target / "unet" / "config.json")["cross_attention_dim"]
    model_cfg = read_json(target / "open_clip" / CLIP_CONFIG_NAME)["model_cfg"]
    if reads != model_cfg["text_cfg"]["width"]:
        raise ValueError(
            f"the UNet reads text of width {reads}, the text encoder's has {model_cfg['text_cfg']['width']}"
        )


def _found(recognized: str, stated: str | None, num_updates: int | None, notes: list[str]) -> dict[str, Any]:
    return {
        "recognized_as": recognized,
        "prediction_type": stated,
        "ema_num_updates": num_updates,
        "notes": notes,
    }


# -------------------------------------------------------------------------------------------------------------- checks


def _present(config: dict[str, Any] | None) -> dict[str, Any]:
    if config is None:
        raise ValueError("model.base: a folder of weights has no config.json")
    return config


def _checked(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> Mapping[str, Tensor]:
    """The state dict, if it is exactly what the config wants: keys, shapes, floating point."""
    missing, extra = [key for key in shapes if key not in state], [key for key in state if key not in shapes]
    if missing or extra:
        found = [some_of(missing, "keys are missing")] * bool(missing) + [some_of(extra, "are unexpected")] * bool(
            extra
        )
        raise ValueError(f"{where}: does not fit its config.json: {'; '.join(found)}")
    shape = _shape_of(state)
    wrong = [f"{key} is {list(shape(key))}, not {list(size)}" for key, size in shapes.items() if shape(key) != size]
    if wrong:
        raise ValueError(f"{where}: does not fit its config.json: {some_of(wrong, 'tensors have other shapes')}")
    return _floats_only(state, where)


def _floats_only(state: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
    wrong = [f"{key} is {state[key].dtype}" for key in state if state[key].dtype not in _FLOATS]
    if wrong:
        raise ValueError(f"{where}: {some_of(wrong, 'tensors are not floating point')}")
    return state


# ------------------------------------------------------------------------------------------------------- lazy mappings


def _shape_of(state: Mapping[str, Tensor]) -> base_configs.Shape:
    return lambda key: tuple(state[key].shape)


class _Chosen(Mapping[str, Tensor]):
    """Some keys of a mapping."""

    def __init__(self, state: Mapping[str, Tensor], keys: Iterable[str]) -> None:
        self._state, self._keys = state, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Renamed(Mapping[str, Tensor]):
    """A mapping under other keys; `only` some of them."""

    def __init__(self, state: Mapping[str, Tensor], rename: Any, *, only: Iterable[str] | None = None) -> None:
        self._state = state
        self._names = {rename(key): key for key in (state if only is None else only)}

    def __getitem__(self, key: str) -> Tensor:
        return self._state[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Prefixed(_Renamed):
    """The keys that begin with a prefix, without it."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__(state, lambda key: key.removeprefix(prefix), only=[k for k in state if k.startswith(prefix)])


class _Shapes(_Chosen):
    """The same tensors without their data."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state, state)

    def __getitem__(self, key: str) -> Tensor:
        return self._state[key].to("meta")


def _used_of_transformers(weights: Weights) -> Mapping[str, Tensor]:
    unused = (".position_ids", "text_projection.weight")
    return _Chosen(weights, [key for key in weights if not key.endswith(unused)])
