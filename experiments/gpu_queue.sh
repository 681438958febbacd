#!/usr/bin/env bash
# The measurements of gpu_queue.md, entry by entry, each within ten minutes on one large GPU.
#
#   experiments/gpu_queue.sh prepare [image folder]    where there is a network, for a machine without one: fills .gpu/
#   experiments/gpu_queue.sh <entry> ...               where the GPU is; without an entry all but the next
#   experiments/gpu_queue.sh autoattack                hours, and no limit; autoattack-smoke tries it at a small size
#   experiments/gpu_queue.sh compile [topology]        where there is no GPU: compiles the steps for h200, with estimates
#
# Results go to $OUT, or experiments/results/benchmark/; a short table comes last. Images: $IMAGES, a folder with
# train/<class>/*, test/<class>/*, or what `prepare` packed, or random ones, which are as good for timing. $RUNS rounds
# (3) of $TIMED seconds (5), at most $LIMIT seconds for an entry (570), with $PYTHON (python3). $MORE: further arguments
# for all entries, to try them at a small size. The entry autoattack is one round with the network of the run in
# $WORKDIR; without it, with one that it first trains for $EPOCHS epochs (5) on all training images; with an untrained
# one, of which no image survives long, if the images are random. MORE=--images=500 makes it minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-experiments/results/benchmark}
limit=${LIMIT:-570}
entries=(resnet18-bfloat16 resnet18-command-buffer resnet18-float32 wrn-34-10-batch64 wrn-34-10-batch128 resnet18-profile wrn-34-10-profile attack start data scaling)

prepare() { # what a machine without network lacks: pure Python packages, images, the name of the commit
    rm -rf .gpu && mkdir -p .gpu/wheels || exit
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version=3.12 -d .gpu/wheels \
        'ml-collections>=1.1,<2' 'absl-py>=2.3,<3' 'etils>=1.14,<2' || exit
    [ $# -eq 0 ] || tar -C "$1" --sort=name -czf .gpu/images.tar.gz train test || exit
    git describe --always --dirty --exclude='*' >.gpu/commit || exit
    du -sh .gpu
}

compile() { # topology: the steps of all entries, and the attacks of `attack` and `autoattack`
    local at_bsl=configs/at_bsl.py:dataset=cifar10 robal=configs/robal.py:dataset=cifar10 entry config batch dtype more
    while read -r entry config batch dtype more; do
        printf '\n%s\n' "$entry"
        # shellcheck disable=SC2086
        "$python" -m lt_adv.main --mode=compile --topology="$1" --config="$config" --workdir="$scratch/$entry" \
            --config.optim.batch_size="$batch" --config.model.dtype="$dtype" $more || return
    done <<END
resnet18-bfloat16 $at_bsl 128 bfloat16
resnet18-float32 $at_bsl 128 float32
wrn-34-10-batch64 $robal 64 bfloat16
wrn-34-10-batch128 $robal 128 bfloat16
attack $at_bsl 128 float32 --programs=eval --config.eval.only=('pgd20',) --config.eval.batch_size=128
scaling-64 $at_bsl 64 bfloat16
scaling-256 $at_bsl 256 bfloat16
scaling-512 $at_bsl 512 bfloat16
autoattack configs/at.py:dataset=cifar10 128 bfloat16 --programs=eval --config.eval.only=('autoattack',) --config.eval.batch_size=500
END
}

set_up() { # packages beside those of the machine, images, and where decoded ones are kept
    scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
    export TFDS_DATA_DIR=$scratch/data LT_ADV_COMMIT=${LT_ADV_COMMIT:-$(cat .gpu/commit 2>/dev/null)}
    if [ -d .gpu/wheels ]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" .gpu/wheels/*.whl || exit
        export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
    fi
    local images=${IMAGES:-}
    if [ -z "$images" ] && [ -f .gpu/images.tar.gz ]; then
        images=$scratch/images && mkdir "$images" && tar -C "$images" -xzf .gpu/images.tar.gz || exit
    fi
    real=$images
    if [ -n "$images" ]; then
        data=(--config.data.name=image_folder --config.data.path="$images" --config.data.title="CIFAR-10-LT (image folder)")
    else
        "$python" -c "$RANDOM_IMAGES" "$scratch/random.npz" || exit
        data=(--config.data.name=npz --config.data.path="$scratch/random.npz" --config.data.title="random images")
    fi
    device=$( (nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null || echo cpu) | head -n 1 | tr -c '[:alnum:]\n' -)
}
RANDOM_IMAGES='
import sys, numpy as np
rng = np.random.default_rng(0)
images = {f"{k}_image": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for k, n in (("train", 50000), ("test", 10000))}
labels = {f"{k}_label": np.arange(n) % 10 for k, n in (("train", 50000), ("test", 10000))}
np.savez(sys.argv[1], **images, **labels)'

benchmark() { # kind, config, further arguments
    local kind=$1 config=$2
    shift 2
    timeout --kill-after=20 "$limit" "$python" -m experiments.benchmark "$kind" --config="$config" "${data[@]}" \
        --runs="${RUNS:-3}" --seconds="${TIMED:-5}" --name="$entry-$device" --out="$out" "$@" ${MORE:-}
}

autoattack() { # further arguments of both: a smaller network
    local at=configs/at.py:dataset=cifar10 limit=${LIMIT:-172800} workdir=${WORKDIR:-}
    set -- --config.data.imbalance=none "$@"
    if [ -z "$workdir" ] && [ -n "$real" ]; then
        workdir=$scratch/$entry
        timeout --kill-after=20 "$limit" "$python" -m lt_adv.main --config="$at,epochs=${EPOCHS:-5}" "${data[@]}" \
            --workdir="$workdir" --config.model.dtype=bfloat16 --config.eval.only="('fgsm',)" "$@" >&2 || return
    fi
    RUNS=${RUNS:-1} benchmark autoattack "$at" ${workdir:+--workdir="$workdir"} --config.eval.batch_size=500 "$@"
}

measure() {
    local resnet=configs/at_bsl.py:dataset=cifar10 wrn=configs/robal.py:dataset=cifar10
    local tiny="--config.model.depth=10 --config.model.width=1"
    case $entry in
        resnet18-bfloat16) benchmark step $resnet --config.model.dtype=bfloat16 ;;
        resnet18-command-buffer) XLA_FLAGS=--xla_gpu_enable_command_buffer=+WHILE benchmark step $resnet --config.model.dtype=bfloat16 --frameworks=jax ;;
        resnet18-float32) benchmark step $resnet --frameworks=jax,released ;; # "tuned" is bfloat16 on a GPU
        wrn-34-10-batch64) benchmark step $wrn --config.model.dtype=bfloat16 ;;
        wrn-34-10-batch128) benchmark step $wrn --config.model.dtype=bfloat16 --config.optim.batch_size=128 ;;
        resnet18-profile) benchmark profile $resnet --config.model.dtype=bfloat16 ;;
        wrn-34-10-profile) benchmark profile $wrn --config.model.dtype=bfloat16 ;;
        attack) benchmark attack $resnet --num-steps=10,20,100 ;;
        start) benchmark start $wrn --config.model.dtype=bfloat16 ;;
        data) benchmark data $resnet ;;
        scaling) benchmark scaling $resnet --config.model.dtype=bfloat16 --batch-size=64,128,256,512 --num-steps=1,5,10 ;;
        autoattack) autoattack ;;
        autoattack-smoke) MORE="--images=64 --queries=50 --eps=0.002 ${MORE:-}" autoattack $tiny ;;
        smoke) # a tiny network through the same machinery, on whatever there is
            benchmark step $wrn $tiny --config.optim.batch_size=16 ;;
    esac
}

if [ "${1:-}" = prepare ]; then
    prepare "${@:2}"
    exit
fi
if [ "${1:-}" = compile ]; then
    scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
    compile "${2:-h200}"
    exit
fi
[ $# -gt 0 ] || set -- "${entries[@]}"
for entry in "$@"; do
    [[ " ${entries[*]} autoattack autoattack-smoke smoke " == *" $entry "* ]] && continue
    echo "Unknown entry $entry. There are: prepare ${entries[*]} autoattack autoattack-smoke smoke." >&2
    exit 2
done
set_up
mkdir -p "$out"
failed=()
for entry in "$@"; do
    measure >"$scratch/$entry.table" || failed+=("$entry")
done
for entry in "$@"; do
    printf '\n%s\n' "$entry" && cat "$scratch/$entry.table"
done
[ ${#failed[@]} -eq 0 ] || { echo "Failed, in part or as a whole: ${failed[*]}" >&2 && exit 1; }
