#!/bin/sh
# What a container runs: a verb of `lacuna`, or one of the programs that work pools and launchers name.
set -eu
case "${1:-}" in
    prefect | python | python3 | torchrun | deepspeed | accelerate | dask | bash | sh) exec "$@" ;;
    *) exec lacuna "$@" ;;
esac
