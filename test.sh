#!/bin/sh
# Runs the tests, setting everything up at the first call; arguments go to pytest, as in ./test.sh -k prior
# With DDVI_DATA naming a folder that holds MNIST, tests on real data run too.
set -eu
root=$(cd "$(dirname "$0")" && pwd)
"$root/scripts/setup.sh"
cd "$root"
OMP_NUM_THREADS=1 # two workers, a thread each
export OMP_NUM_THREADS
exec "$root/.venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
