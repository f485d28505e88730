#!/bin/sh
# Runs the 30 unsupervised commands of the seed on a part of the real data, a line for each:
#   scripts/seed_commands.sh data_root=FOLDER [key=value…]
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/setup.sh" || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
trap 'exit 130' INT TERM
passed=0
failed=0

# run_one DATASET ALGORITHM PRIOR [key=value…]: one run, one line
run_one() {
    name="$1 $2 $3"
    begun=$(date +%s)
    if "$root/run.sh" "$@" out="$out/$1/$2/$3" >"$out/log" 2>&1; then
        verdict=ok
        passed=$((passed + 1))
    else
        verdict=FAILED
        failed=$((failed + 1))
    fi
    printf '%-44s %-6s %4d s\n' "$name" "$verdict" "$(($(date +%s) - begun))"
    [ "$verdict" = ok ] || tail -n 5 "$out/log"
    rm -rf "${out:?}/$1"
}

for dataset in mnist cifar; do
    for method in diff_vae_warmup vae iaf_vae h_iaf_vae aae; do
        for prior in pinwheel swiss_roll less_noisy_square; do
            run_one "$dataset" "$method" "$prior" limit=2000 epochs=1 evaluation=quick "$@"
        done
    done
done

echo "$passed ok, $failed failed"
[ "$failed" = 0 ]
