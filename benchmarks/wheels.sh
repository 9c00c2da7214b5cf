#!/usr/bin/env bash
# The wheels that travel to a GPU without a network, which has torch, triton, transformers, accelerate and what they need.
#     bash benchmarks/wheels.sh --list         what they are, and why
#     bash benchmarks/wheels.sh DIR            download them into DIR; then: gpu.sh --wheels DIR
#     bash benchmarks/wheels.sh DIR --all      also the optional ones
# PYTHON_VERSION (3.12) and PLATFORM (manylinux_2_28_x86_64) are those of the machine with the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
PLATFORM=${PLATFORM:-manylinux_2_28_x86_64}
MOST_MIB=64

# name, the version of constraints.txt where there is none here; why it travels
NEEDED=(
    "datasets|          both trainers read their pairs from it"
    "dill|              datasets needs it"
    "multiprocess|      datasets needs it"
    "trl|               the trainer that a step is compared with"
    "liger-kernel|      a provider of benchmarks.head"
)
OPTIONAL=(
    "cut-cross-entropy| a provider of benchmarks.head"
    "peft|              steps with LoRA"
    "pytest|            the tests, where it is not installed"
    "xxhash|            datasets needs it, where it is not installed"
    "quack-kernels|     a head to compare with by hand, with the three below"
    "nvidia-cutlass-dsl|      quack-kernels needs it"
    "nvidia-cutlass-dsl-libs-base| nvidia-cutlass-dsl needs it"
    "apache-tvm-ffi|    quack-kernels needs it"
)

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}
folder= all= list=
for word in "$@"; do
    case $word in
        --all) all=1 ;;
        --list) list=1 ;;
        -*) usage ;;
        *) [ -z "$folder" ] || usage; folder=$word ;;
    esac
done
[ -n "$folder$list" ] || usage

pinned() { # name==version, as constraints.txt has it
    grep -m1 -o "^$1==[^; ]*" constraints.txt || echo "$1"
}
if [ -n "$list" ]; then
    for entry in "${NEEDED[@]}"; do echo "needed    $(pinned "${entry%%|*}"): $(echo ${entry#*|})"; done
    for entry in "${OPTIONAL[@]}"; do echo "optional  $(pinned "${entry%%|*}"): $(echo ${entry#*|})"; done
    exit
fi
mkdir -p "$folder"
wanted=("${NEEDED[@]}" ${all:+"${OPTIONAL[@]}"})
packages=()
for entry in "${wanted[@]}"; do packages+=("$(pinned "${entry%%|*}")"); done
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" --only-binary=:all: \
    --implementation cp --python-version "$PYTHON_VERSION" \
    --platform "$PLATFORM" --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "${packages[@]}"
ls -l "$folder"/*.whl | awk -v most=$MOST_MIB '
    { name = $NF; sub(".*/", "", name); printf "%8.0f KiB  %s\n", $5 / 1024, name; total += $5 }
    END {
        printf "%8.0f KiB  in all\n", total / 1024
        if (total > most * 1048576) printf "more than the %d MiB that travel at once\n", most
    }'
