#!/bin/sh
# Runs the paper's 54 commands on a part of the real data, a line for each:
#   scripts/seed_commands.sh [-k PATTERN] [data_root=FOLDER] [key=value…]
# The shell's PATTERN picks among "DATASET ALGORITHM PRIOR": -k '*_semi pinwheel' runs eight of them.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
pattern='*'
if [ "${1-}" = -k ]; then
    pattern=${2:?"-k needs a pattern, as in -k 'mnist vae *'"}
    shift 2
fi
"$root/scripts/setup.sh" || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
trap 'exit 130' INT TERM
passed=0
failed=0

# run_one DATASET ALGORITHM PRIOR [key=value…]: one run, one line, if the pattern is its
run_one() {
    name="$1 $2 $3"
    # shellcheck disable=SC2254 # a pattern is meant
    case $name in
    $pattern) ;;
    *) return ;;
    esac
    begun=$(date +%s)
    if "$root/run.sh" "$@" out="$out/$1/$2/$3" >"$out/log" 2>&1; then
        verdict=ok
        passed=$((passed + 1))
    else
        verdict=FAILED
        failed=$((failed + 1))
    fi
    printf '%-53s %-6s %4d s\n' "$name" "$verdict" "$(($(date +%s) - begun))"
    [ "$verdict" = ok ] || tail -n 5 "$out/log"
    rm -rf "${out:?}/$1"
}

for dataset in mnist cifar mnist_semi cifar_semi; do
    case $dataset in
    *_semi) methods='diff_vae_warmup_semi vae_semi iaf_vae_semi aae_semi' seen=n_labels=200 ;;
    *) methods='diff_vae_warmup vae iaf_vae h_iaf_vae aae' seen= ;;
    esac
    for method in $methods; do
        for prior in pinwheel swiss_roll less_noisy_square; do
            run_one "$dataset" "$method" "$prior" limit=2000 epochs=1 evaluation=quick $seen "$@"
        done
    done
done

echo "$passed ok, $failed failed"
[ "$((passed + failed))" -gt 0 ] && [ "$failed" = 0 ]
