#!/usr/bin/env bash
# All that is measured on a GPU, on a machine with CUDA and torch and nothing else, without a network.
#
#     benchmarks/gpu.sh [--work DIR] [--wheels DIR] [--device cuda:0] [--dataset FOLDER] [--python PATH]
#                       [--reference-python PATH] [--quick] [PART ...]
#
# Each part takes less than 8 minutes and adds a line of JSON to DIR/gpu.jsonl; one that has its line is not run again,
# so the same command goes on after an interruption. A part that lacks something says so ("skipped") and is tried again;
# one that fails does not stop the others. Logs are in DIR.
# What the machine lacks comes as wheels, in one or more trips; the part `packages` names it. Make them elsewhere, for the
# Python of that machine:
#
#     pip wheel --no-deps -w wheels . && pip download --no-deps --only-binary :all: -d wheels NAME ...
#
# --dataset is in nnU-Net's layout, hippocampus if it can be had; without it one is made up. --reference-python belongs
# to an environment with nnunetv2. `--device cpu --quick` tries it all on a processor.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=gpu-benchmark wheels= device=cuda:0 dataset= python=python3 reference= quick=
parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --work) work=$2; shift ;;
        --wheels) wheels=$2; shift ;;
        --device) device=$2; shift ;;
        --dataset) dataset=$2; shift ;;
        --python) python=$2; shift ;;
        --reference-python) reference=$2; shift ;;
        --quick) quick=yes ;;
        -*) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
        *) parts+=("$1") ;;
    esac
    shift
done
networks="hippocampus volume picture"
limit=470 # seconds
if [ ${#parts[@]} -eq 0 ]; then
    parts=(packages peak)
    for kind in steps compiled waiting reference; do
        for network in $networks; do parts+=("$kind-$network"); done
    done
    parts+=(dataset training inference tests)
fi
mkdir -p "$work"
work=$(cd "$work" && pwd)
results=$work/gpu.jsonl
touch "$results"
export PYTHONPATH="$work/packages${PYTHONPATH:+:$PYTHONPATH}"

failed=0
for part in "${parts[@]}"; do
    if grep "^{\"part\": \"$part\"," "$results" | grep -qv '"skipped"'; then
        echo "$part: has its line" >&2
        continue
    fi
    command=("$python" "$here/gpu.py" "$part" --device "$device" --work "$work" ${quick:+--quick})
    command+=(${dataset:+--dataset "$dataset"} ${reference:+--reference-python "$reference"})
    if [ "$part" = packages ]; then
        command=("$python" "$here/gpu_packages.py" --target "$work/packages" ${wheels:+--wheels "$wheels"})
    fi
    echo "$part: begins" >&2
    if timeout "$limit" "${command[@]}" 2>"$work/$part.log" >"$work/$part.out"; then
        tail -n 1 "$work/$part.out" | sed "s/^{/{\"part\": \"$part\", /" | tee -a "$results"
    else
        echo "$part: failed; $(tail -n 1 "$work/$part.log") (all of it in $work/$part.log)" >&2
        failed=1
    fi
done
exit $failed
