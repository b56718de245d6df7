"""The command line: ``lacuna VERB``. Prefect is imported only by the verbs that run a flow."""

import contextlib
import importlib
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ValidationError

from flows.config import PipelineConfig, explain, load_config, recipe_names
from flows.operate import operate_app
from infra.errors import (
    EXIT_BAD_INPUT,
    EXIT_GATE_REFUSED,
    EXIT_INTERRUPTED,
    EXIT_OUTSIDE_WORLD,
    EXIT_WALLTIME,
    GateError,
    TransientError,
    WalltimeError,
)

_EXIT_UNEXPECTED = 1
_EPILOG = (
    "Exit codes: 0 done, 2 bad input, 3 a gate refused, 4 the outside world failed (a retry may help), 5 the time that "
    "was granted is nearly over (the same command goes on), 130 interrupted."
)

app = typer.Typer(
    name="lacuna",
    help="Prepares LAION data and trains Stable-Diffusion-2-type inpainting models, as Prefect flows.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(operate_app, epilog=_EPILOG)

Recipe = Annotated[
    str, typer.Option("--recipe", metavar="NAME|PATH", help=f"A recipe: {', '.join(recipe_names())}, or a YAML file.")
]
Root = Annotated[
    str, typer.Option("--root", metavar="URI", help="The object store: a folder, file:///… or s3://bucket/prefix.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Overrides one key of the recipe, the value in YAML: train.num_steps=100. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Makes one JSON object the last line of stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Shows tracebacks and Prefect's own logging.")]
Uri = Annotated[
    str,
    typer.Argument(metavar="URI", help="A dataset, checkpoint, report or export: URI, key below --root, or a channel."),
]

_RECIPE = "demo"
_ROOT = "./var/store"
_DEFAULT_DEPTH = 16


# ------------------------------------------------------------------------------------------------ verbs that run flows


@app.command(epilog=_EPILOG)
def run(
    recipe: Recipe = _RECIPE, root: Root = _ROOT, set_: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Runs the whole pipeline: select, download, encode, train, validate, publish.

    What is done already is not done again: after an interruption, give the same command.
    """
    _run_flow("pipeline", "run_screen", recipe, root, set_, as_json, debug)


@app.command(epilog=_EPILOG)
def prepare(
    recipe: Recipe = _RECIPE, root: Root = _ROOT, set_: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Makes the dataset: selects rows, downloads their pictures, encodes them."""
    _run_flow("prepare", "prepare_screen", recipe, root, set_, as_json, debug)


@app.command(epilog=_EPILOG)
def train(
    recipe: Recipe = _RECIPE, root: Root = _ROOT, set_: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Trains on what `prepare` has made, or on the dataset that train.dataset names."""
    _run_flow("train", "train_screen", recipe, root, set_, as_json, debug)


@app.command(epilog=_EPILOG)
def validate(
    recipe: Recipe = _RECIPE, root: Root = _ROOT, set_: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Measures what `train` has made, by inpainting held-out pictures."""
    _run_flow("validate", "validate_screen", recipe, root, set_, as_json, debug)


@app.command(epilog=_EPILOG)
def publish(
    recipe: Recipe = _RECIPE, root: Root = _ROOT, set_: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Exports what `train` has made, and moves the channels that may be moved."""
    _run_flow("publish", "publish_screen", recipe, root, set_, as_json, debug)


@app.command(epilog=_EPILOG)
def refresh(
    recipe: Recipe = _RECIPE,
    root: Root = _ROOT,
    set_: Set = None,
    and_train: Annotated[bool, typer.Option("--train", help="Trains on the dataset, too.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prepares from the current metadata and says what is new since the last refresh."""
    _run_flow("refresh", "refresh_screen", recipe, root, set_, as_json, debug, train=and_train)


def _run_flow(
    verb: str,
    screen: str,
    recipe: str,
    root: str,
    overrides: list[str] | None,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    with _exit_codes(as_json, debug):
        from flows import screens
        from flows.plan import find_dataset, preflight
        from flows.progress import listening
        from flows.server import prefect_server
        from flows.store import absolute_root
        from infra.storage import open_store

        config = load_config(recipe, overrides or ())
        root = absolute_root(root)
        if verb in ("pipeline", "prepare", "refresh"):
            preflight(config, root)
        elif config.model.find_directory() is not None:  # else the flow converts the base first, and then looks
            find_dataset(config, open_store(root))
        with prefect_server(root, debug=debug), listening():
            from prefect import tags

            with tags("lacuna"):  # as deployments have it: automations know our runs by it
                result: BaseModel = getattr(importlib.import_module(f"flows.{verb}"), verb)(config, root, **options)
        _show(result.model_dump(mode="json"), getattr(screens, screen)(result), as_json)


# ------------------------------------------------------------------------------------------------------ verbs that look


@app.command(epilog=_EPILOG)
def plan(
    recipe: Recipe = _RECIPE,
    root: Root = _ROOT,
    set_: Set = None,
    write_run: Annotated[
        Path | None,
        typer.Option(
            "--write-run",
            metavar="FILE",
            help="Writes what `python -m training.main --run-file FILE` reads, which torchrun, deepspeed, accelerate, "
            "Slurm or Kubernetes start: see infra/README.md. The dataset must be there.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Says what is done and what would run, and checks beforehand all that can be checked."""
    with _exit_codes(as_json, debug):
        from dataclasses import asdict

        from flows.plan import launched_run, preflight
        from flows.screens import plan_screen
        from flows.store import absolute_root

        config, root = load_config(recipe, set_ or ()), absolute_root(root)
        found = preflight(config, root)
        values, text = {**asdict(found), "is_done": found.is_done}, plan_screen(found)
        if write_run is not None:
            run = launched_run(config, root)
            _write(write_run, run.model_dump_json(indent=1), "--write-run")
            values |= {"run_id": run.run_id, "run_file": str(write_run.absolute())}
            text += f"\nrun {run.run_id}: {run.train.num_processes} processes of training.main --run-file {write_run}"
        _show(values, text, as_json)


@app.command(epilog=_EPILOG)
def status(root: Root = _ROOT, as_json: Json = False, debug: Debug = False) -> None:
    """Lists what stands in the store: datasets, runs, channels.

    Datasets stand below the one that they were made from, with rows, bytes, age, and the runs that train on them; one
    that is being made shows how many of its shards are done. The keys that are shown are what `inspect`, `verify` and
    `pull` take.
    """
    with _exit_codes(as_json, debug):
        from datetime import UTC, datetime

        from flows.screens import status_json, status_screen
        from flows.status import status_of
        from infra.storage import open_store

        found = status_of(open_store(root))
        _show(status_json(found), status_screen(found, datetime.now(UTC)), as_json)


@app.command(epilog=_EPILOG)
def inspect(
    uri: Uri,
    root: Root = _ROOT,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Writes a page that needs nothing else.")
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, max=1000, help="Rows that the page shows as pictures.")
    ] = 12,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="NAME|PATH", help="As model.base, if its VAE is not found on this machine."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Shows what is in a dataset or bundle, and what it was made from.

    Schema with bytes a row, counts, drop reasons through all stages, specs, files. With --html a page for people:
    distributions of scores and sizes, hosts, storage, and a contact sheet of crops, masks, captions, and of the
    stored latents as the VAE decodes them.

    lacuna inspect datasets/encode/0123456789abcdef --html sheet.html
    """
    with _exit_codes(as_json, debug):
        from flows.inspection import inspect as inspect_store
        from flows.inspection import inspect_json, inspect_page
        from flows.progress import listener, listening
        from flows.screens import inspect_screen
        from flows.store import locate

        found = inspect_store(*locate(uri, root))
        if html is not None:
            with listening():
                page = inspect_page(
                    found, rows, base=base, on_progress=lambda done, total: listener().advance("decode", done, total)
                )
            _write(html, page)
        described = inspect_json(found)
        _show(described, inspect_screen(described), as_json)


@app.command(epilog=_EPILOG)
def verify(
    uri: Uri,
    root: Root = _ROOT,
    deep: Annotated[
        int | None,
        typer.Option(
            "--deep", metavar="[N]", min=1, help=f"Encodes N random rows again, too, and compares [{_DEFAULT_DEPTH}]."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME|PATH", help="For --deep: as model.base, if not found here.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Reads every file that a manifest names and compares its size and sha256.

    Files that are missing, that hold something else, and that nothing names are listed on stderr, a line each, and the
    exit code is 3. With --deep, rows of an encode dataset are made again from their pictures and compared with what is
    stored.

    lacuna verify datasets/encode/0123456789abcdef --deep 16
    """
    with _exit_codes(as_json, debug):
        from flows.progress import listening
        from flows.screens import verify_json, verify_screen
        from flows.verification import verify_uri

        with listening():
            found = verify_uri(uri, root, num_rows=deep, base=base)
        for problem in found.problems:
            print(problem, file=sys.stderr)
        if found.problems:
            raise GateError(
                f"verify: {len(found.problems)} problems in {found.num_files} files of {found.uri}", verify_json(found)
            )
        _show(verify_json(found), verify_screen(found), as_json)


@app.command(epilog=_EPILOG)
def pull(
    channel: Annotated[
        str, typer.Argument(metavar="CHANNEL", help="latest, best, stable, or the key of a bundle's folder.")
    ],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="The folder to make; it appears only once it is whole.")
    ],
    root: Root = _ROOT,
    if_changed: Annotated[
        bool, typer.Option("--if-changed", help="Be content with a folder that holds this version: nothing is read.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetches what a channel points to: resolved, downloaded, every hash verified, renamed into place.

    Prints the folder's path on stdout. What was interrupted goes on; what is there already is hashed again, or with
    --if-changed believed by its manifest and sizes. Others, without this program: docs/consumers.md.

    lacuna pull stable --root s3://bucket/prefix --to models/stable --if-changed
    """
    with _exit_codes(as_json, debug):
        from flows.progress import listener, listening
        from flows.screens import pull_json, pull_screen
        from infra.channels import pull as pull_bundle
        from infra.storage import open_store

        with listening():
            told = listener()  # bytes come in threads, which would look for a listener of their own

            def tell(num_done: int, num_bytes: int) -> None:
                told.advance("pull", num_done // 10**6, num_bytes // 10**6, "MB")

            found = pull_bundle(open_store(root), channel.rstrip("/"), to, if_changed=if_changed, on_progress=tell)
        print(pull_screen(found), file=sys.stderr, flush=True)
        _show(pull_json(found, to), str(to.absolute()), as_json)


@app.command(epilog=_EPILOG)
def presign(
    channel: Annotated[
        str, typer.Argument(metavar="CHANNEL", help="latest, best, stable, or the key of a bundle's folder.")
    ],
    root: Root = _ROOT,
    expires: Annotated[
        int, typer.Option("--expires", metavar="SECONDS", help="How long the addresses are valid, at most 7 days.")
    ] = 3600,
    debug: Debug = False,
) -> None:
    """Prints addresses of every file that a channel points to, for those who have no credentials, as JSON.

    Whoever has the JSON can read these files until it expires. docs/consumers.md says how; `lacuna_pull.py` takes it.

    lacuna presign stable --root s3://bucket/prefix --expires 86400 > stable.json
    """
    with _exit_codes(False, debug):
        from infra.presigning import presign as presign_bundle
        from infra.storage import open_store

        print(presign_bundle(open_store(root), channel.rstrip("/"), expires).model_dump_json(indent=1))


@app.command("show-config", epilog=_EPILOG)
def show_config(recipe: Recipe = _RECIPE, set_: Set = None, as_json: Json = False, debug: Debug = False) -> None:
    """Shows the recipe with every default and override in place."""
    with _exit_codes(as_json, debug):
        values = load_config(recipe, set_ or ()).model_dump(mode="json")
        _show(values, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(), as_json)


@app.command(epilog=_EPILOG)
def doctor(root: Root = _ROOT, as_json: Json = False, debug: Debug = False) -> None:
    """Shows what this machine has, and tries the store and Prefect's server."""
    with _exit_codes(as_json, debug):
        from flows.server import beside, prefect_server
        from flows.store import absolute_root
        from infra.storage import open_store

        root = absolute_root(root)
        found: dict[str, Any] = {
            "python": sys.version.split()[0],
            **{
                name: _version(name)
                for name in (
                    "lacuna-inpainting",
                    "torch",
                    "deepspeed",
                    "diffusers",
                    "open_clip_torch",
                    "prefect",
                    "pyarrow",
                )
            },
            "cores": len(os.sched_getaffinity(0)),
            "gpu": _gpu(),
            "free_disk_gb": round(_free_bytes(beside(root, "work")) / 1e9, 1),
        }
        open_store(root).check_writable()
        found["store"] = f"{root}: takes writes and decides races"
        with prefect_server(root, debug=debug):
            found["prefect_server"] = f"answers; its history is in {os.environ.get('PREFECT_HOME', 'PREFECT_API_URL')}"
        _show(found, "\n".join(f"{name:<18} {value}" for name, value in found.items()), as_json)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _free_bytes(folder: Path) -> int:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


@app.command(epilog=_EPILOG)
def forget(
    url: Annotated[
        list[str] | None, typer.Option("--url", metavar="URL", help="An address, as in the metadata. Repeatable.")
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="HOST", help="A host, and all below it. Repeatable.")
    ] = None,
    sha256: Annotated[
        list[str] | None, typer.Option("--sha256", metavar="HEX", help="Of a picture as it was served. Repeatable.")
    ] = None,
    uid: Annotated[list[str] | None, typer.Option("--uid", metavar="HEX", help="Of a row. Repeatable.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="LIST", help="A list: 'url https://…', 'host …', … a line.")
    ] = None,
    root: Root = _ROOT,
    reason: Annotated[
        str, typer.Option("--reason", metavar="REASON", help="request, opt_out or withdrawn.")
    ] = "request",
    by: Annotated[str | None, typer.Option("--by", metavar="TEXT", help="Who notes it [the account's name].")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only says what holds the rows.")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Removes the rows from the files, too; alone: all that were forgotten.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Forgets rows: from here on nothing reads them, downloads them or trains on them.

    Says which datasets hold them, and which checkpoints, exports and channels were trained on them. Addresses and hosts
    are kept as hashes only. A training that is under way leaves the rows out from its next start on.

    lacuna forget --url https://example.com/a.jpg --host example.org --compact
    """
    with _exit_codes(as_json, debug):
        from flows.forget import forget as forget_rows
        from flows.forget import forgotten_json, parse_entries, urls_in
        from flows.screens import forget_screen
        from infra.storage import open_store

        named: dict[Any, list[str]] = {"url": url or [], "host": host or [], "sha256": sha256 or [], "uid": uid or []}
        entries = parse_entries(named, file, reason, by)
        if not entries and not compact:
            raise ValueError("forget: nothing is named; give --url, --host, --sha256, --uid, --file or --compact")
        found = forget_rows(
            open_store(root),
            entries,
            is_dry_run=dry_run,
            with_compaction=compact,
            urls=urls_in(named, file),
        )
        _show(forgotten_json(found), forget_screen(found), as_json)


# ------------------------------------------------------------------------------------------------------------- endings


def _write(path: Path, text: str, option: str = "--html") -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{option}: {str(path)!r} cannot be written: {error.strerror}") from None


def _show(values: dict[str, Any], text: str, as_json: bool) -> None:
    """The result for people, on stdout; with --json that is on stderr, and stdout ends with the result for programs."""
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps(values, ensure_ascii=False), flush=True)


@contextlib.contextmanager
def _exit_codes(as_json: bool, debug: bool) -> Iterator[None]:
    """Turns what a verb raises into one clear line and its exit code; only the unexpected shows a traceback."""
    _log_to_stderr(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = _exit_code_of(error)
        message = _message_of(error)
        if debug or code == _EXIT_UNEXPECTED:
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr, flush=True)
        if as_json:
            details = error.details if isinstance(error, GateError) else {}
            print(json.dumps({**details, "error": message, "exit_code": code}, ensure_ascii=False), flush=True)
        raise typer.Exit(code) from None


def _log_to_stderr(level: int) -> None:
    """Shows our own rooms' logs; Prefect makes the root logger its own when it is imported."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    for room in ("flows", "training", "preprocessing", "model", "infra"):
        logger = logging.getLogger(room)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _exit_code_of(error: BaseException) -> int:
    kinds: tuple[tuple[type[BaseException], int], ...] = (
        (KeyboardInterrupt, EXIT_INTERRUPTED),
        (GateError, EXIT_GATE_REFUSED),
        (TransientError, EXIT_OUTSIDE_WORLD),
        (WalltimeError, EXIT_WALLTIME),
        (ValueError, EXIT_BAD_INPUT),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), _EXIT_UNEXPECTED)


def _message_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on where this one was"
    if isinstance(error, ValidationError):
        return explain(error, PipelineConfig)
    return str(error) or type(error).__name__


def _with_default_depth(words: list[str]) -> list[str]:
    """``--deep`` without a number means ``--deep 16``: typer has no options whose value may be left out."""
    return [
        f"--deep={_DEFAULT_DEPTH}" if word == "--deep" and not following.isdecimal() else word
        for word, following in zip(words, [*words[1:], ""], strict=True)
    ]


# typer's UsageError, which it does not export; BadParameter is one.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """The command ``lacuna``."""
    try:
        code = app(_with_default_depth(sys.argv[1:]), standalone_mode=False)
    except _USAGE_ERROR as error:  # a wrong option, a missing argument: one line, like every other bad input
        message = getattr(error, "format_message", error.__str__)()  # which names the option
        if len(sys.argv) == 1:
            app(["--help"])
        print(f"error: {message} (see `lacuna --help`)", file=sys.stderr, flush=True)
        if "--json" in sys.argv:
            print(json.dumps({"error": message, "exit_code": EXIT_BAD_INPUT}, ensure_ascii=False), flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    main()
