#!/bin/sh
# Makes .venv with the package and all it needs. The second time there is nothing to do; one that was cut off is redone.
# EXTRAS=cluster,pyro adds what these need.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv
stamp=$venv/complete

# What the environment was made from: requirements, and the place, which its scripts have written into them.
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)" $root"
extras=dev${EXTRAS:+,$EXTRAS}

has_extras() {
    for extra in $(echo "$extras" | tr , ' '); do
        case ,$(sed -n 2p "$stamp"), in *",$extra,"*) ;; *) return 1 ;; esac
    done
}

if [ "$(sed -n 1p "$stamp" 2>/dev/null)" = "$wanted" ] && has_extras && [ -x "$venv/bin/ddvi" ] &&
    "$venv/bin/python" -c "" 2>/dev/null; then
    exit 0
fi

fail() {
    echo "set-up: $*" >&2
    exit 1
}

python=
for candidate in "${PYTHON:-python3}" python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11 or newer is needed; install it, or name it, as in PYTHON=/path/to/python3.12 $0"

echo "setting up $venv (once; a few minutes, most of them for PyTorch)" >&2
rm -rf "$venv"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! "$python" -m venv "$venv" >"$log" 2>&1; then
    rm -rf "$venv"
    cat "$log" >&2
    fail "$python can't make a virtual environment; on Debian and Ubuntu: apt install python3-venv"
fi
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    -c "$root/constraints.txt" -e "$root[$extras]" >"$log" 2>&1; then
    cat "$log" >&2
    fail "pip failed, see above; run the same command again to retry"
fi
# On all cores, which pip doesn't; some packages hold files that are no Python of this version.
"$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || :
printf '%s\n%s\n' "$wanted" "$extras" >"$stamp"
