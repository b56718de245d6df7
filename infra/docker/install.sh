#!/usr/bin/env bash
# Installs Lacuna into a virtual environment; the images are built with it, and it runs without a container engine as well.
#
#   infra/docker/install.sh libraries VENV   what pyproject.toml asks for, as requirements.lock pins it, every file by its hash
#   infra/docker/install.sh program VENV     this checkout, editable, from nothing but what is here
#
# Two steps, so that an image keeps its layer of libraries when only the program changes. Run in the checkout; needs
# Python 3.11 or 3.12 with venv, and a package index for the first step.
set -euo pipefail

readonly step=${1:?libraries or program} venv=${2:?the folder of the virtual environment}
cd "$(dirname "$0")/../.."

libraries() {
    local tools
    tools=$(mktemp -d)
    trap 'rm -rf "$tools"' RETURN
    "${PYTHON:-python3}" -m venv "$tools/venv"
    "$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
        --requirement infra/docker/uv.txt

    # The lock also holds what the tests need. Compiling over a copy of it keeps its versions and hashes, and drops what
    # the program does not need; a line that the lock does not have means that the lock is older than pyproject.toml.
    cp requirements.lock "$tools/runtime.lock"
    "$tools/venv/bin/uv" pip compile pyproject.toml --extra dask --universal --generate-hashes --no-header --no-annotate \
        --quiet --output-file "$tools/runtime.lock"
    if grep --line-regexp --invert-match --fixed-strings --file=requirements.lock "$tools/runtime.lock" >&2; then
        echo "requirements.lock: the lines above are missing; say \`make lock\`" >&2
        return 2
    fi

    "${PYTHON:-python3}" -m venv "$venv"
    "$tools/venv/bin/uv" pip install --quiet --python "$venv/bin/python" --require-hashes --compile-bytecode \
        --build-constraints "$tools/runtime.lock" --requirement "$tools/runtime.lock"
}

program() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
        --editable .
    "$venv/bin/python" -m compileall -q flows infra model preprocessing training
    "$venv/bin/lacuna" --help >/dev/null
}

case $step in
    libraries | program) "$step" ;;
    *) echo "install.sh: libraries or program, not '$step'" >&2; exit 2 ;;
esac
