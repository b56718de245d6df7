"""Recipes and --set: what is wrong is said in one line that names the field, its value and what to change."""

from pathlib import Path

import pytest

from flows.config import MAX_RECIPE_BYTES, load_config, recipe_names


def test_overrides_are_yaml(with_base: list[str]) -> None:
    config = load_config(
        "demo",
        [
            *with_base,
            'source.metadata=["a/*.parquet", b.csv]',
            "train.num_steps=7",
            "select.max_pwatermark=null",
            "train.learning_rate=1.0e-3",
            "publish.stable_min={masked_psnr_db: 20}",
        ],
    )
    assert config.source.metadata == ("a/*.parquet", "b.csv")
    assert config.train.num_steps == 7
    assert config.select.max_pwatermark is None
    assert config.train.learning_rate == 1e-3
    assert config.publish.stable_min == {"masked_psnr_db": 20.0}


def test_one_path_needs_no_list(with_base: list[str]) -> None:
    assert load_config("demo", [*with_base, "source.metadata=a.parquet"]).source.metadata == ("a.parquet",)


def test_a_recipe_names_its_runs(with_base: list[str], tmp_path: Path) -> None:
    assert load_config("demo", with_base).recipe == "demo"
    path = tmp_path / "mine.yaml"
    path.write_text((Path(__file__).parents[2] / "flows/recipes/demo.yaml").read_text())
    assert load_config(str(path), with_base).recipe == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_stepz=5", "train.num_stepz: unknown key; did you mean train.num_steps?"),
        ("trane.num_steps=5", "trane: unknown key; did you mean train?"),
        ("select.num_steps=5", "select.num_steps: unknown key; did you mean train.num_steps?"),
        ("source.demo.sed=5", "source.demo.sed: unknown key; did you mean source.demo.seed?"),
        ("train.num_steps=many", "train.num_steps: input should be a valid integer"),
        ("train.num_steps=many", "not 'many'"),
        ("train.num_steps=0", "train.num_steps: input should be greater than or equal to 1, not 0"),
        ("train.precision=fp8", "train.precision: input should be 'fp32', 'bf16' or 'fp16', not 'fp8'"),
        ("select.max_punsafe=.nan", "select.max_punsafe: input should be"),
        ("validation=3", "validation: input should be a valid dictionary"),
        ("train.num_steps.x=3", "train.num_steps: it has no keys of its own"),
        ("train.num_steps", "--set: 'train.num_steps' is not dotted.key=value"),
        ("train..num_steps=3", "--set: 'train..num_steps=3' is not dotted.key=value"),
        ("train.num_steps=[", "--set: the value in 'train.num_steps=[' is not YAML"),
        ("train.global_batch_size=7", "train.global_batch_size: 7 is not a multiple"),
        ("download.allow_networks=[loopback]", "download.allow_networks: 'loopback' does not appear to be"),
        ("model.base=/no/such/folder", "model.base: '/no/such/folder' is not there"),
    ],
)
def test_errors_are_one_clear_line(with_base: list[str], override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is the assertion below
        load_config("demo", [*with_base, override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["prediction_type", "mask_source", "seed"])
def test_scientific_choices_have_no_default(with_base: list[str], tmp_path: Path, key: str) -> None:
    recipe = (Path(__file__).parents[2] / "flows/recipes/demo.yaml").read_text()
    lines = [line for line in recipe.splitlines() if not line.startswith(f"  {key}:")]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"^train\.{key}: missing, and it has no default on purpose"):
        load_config(str(path), with_base)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^recipe: 'dmeo' is neither .*; did you mean demo\?$"):
        load_config("dmeo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "is not a mapping"),
        ("", "is not a mapping"),
        ("# " + "x" * MAX_RECIPE_BYTES, "is larger than"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(str(path))


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(str(path))


def test_every_shipped_recipe_is_valid_and_explains_itself(with_base: list[str]) -> None:
    assert {"demo", "sd2-inpaint-256", "sd2-inpaint-512"} <= set(recipe_names())
    for name in recipe_names():
        load_config(name, with_base)
        header = (Path(__file__).parents[2] / f"flows/recipes/{name}.yaml").read_text()
        assert all(f"# {word}:" in header for word in ("Purpose", "Command", "Expect"))


@pytest.mark.parametrize("recipe", ["sd2-inpaint-256", "sd2-inpaint-512"])
def test_the_real_recipes_want_weights(recipe: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.base: '/path/to/"):
        load_config(recipe)


def test_a_shown_config_can_be_given_back(with_base: list[str]) -> None:
    config = load_config("demo", with_base)
    assert type(config).model_validate(config.model_dump(mode="json")) == config
