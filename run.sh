#!/bin/sh
# Trains a model and prints what it is worth, setting everything up at the first call:
#   ./run.sh                                      digits, diffusion posterior, pinwheel prior
#   ./run.sh DATASET ALGORITHM PRIOR key=value…   as in ./run.sh mnist diff_vae_warmup pinwheel epochs=20
#   ./run.sh list                                 every name and setting; so too --help, evaluate, report, …
set -eu
root=$(cd "$(dirname "$0")" && pwd)
"$root/scripts/setup.sh"
case "${1-}" in
train | evaluate | report | compare | sample | embed | study | tables | list | -h | --help | --version) ;;
*)
    DDVI_PROGRAM=$0
    export DDVI_PROGRAM
    set -- train "$@"
    ;;
esac
exec "$root/.venv/bin/ddvi" "$@"
