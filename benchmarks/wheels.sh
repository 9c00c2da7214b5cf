#!/usr/bin/env bash
# The wheels that travel to a GPU without a network, which has torch, triton, transformers, accelerate and what they need.
#     bash benchmarks/wheels.sh --list         what they are, and why
#     bash benchmarks/wheels.sh DIR            download them into DIR; then: gpu.sh --wheels DIR
#     bash benchmarks/wheels.sh DIR --all      also what an image with PyTorch mostly has, and cut-cross-entropy
#     bash benchmarks/wheels.sh DIR --quack    also QuACK's head, and what it and Liger's for Hopper are compiled with
# At most 64 MiB travel at once. A wheel that is larger is cut into DIR.parts/, one piece a transfer; there:
#     cat DIR.parts/NAME.whl.* > DIR/NAME.whl
# Status 1 where the others are more than that, too.
# PYTHON_VERSION (3.12) and PLATFORM (manylinux_2_28_x86_64) are those of the machine with the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
PLATFORM=${PLATFORM:-manylinux_2_28_x86_64}
MOST_MIB=64
PIECE_MIB=48 # beside the checkout itself

# name, the version of constraints.txt where there is none here; why it travels
NEEDED=(
    "datasets|          both trainers read their pairs from it"
    "dill|              datasets needs it"
    "multiprocess|      datasets needs it"
    "trl|               the trainer that a step is compared with"
    "liger-kernel|      heads to compare with"
)
OPTIONAL=(
    "cut-cross-entropy| a head to compare with"
    "peft|              steps with LoRA"
    "pytest|            the tests, where it is not installed"
    "xxhash|            datasets needs it, where it is not installed"
)
QUACK=(
    "quack-kernels|                a head to compare with"
    "nvidia-cutlass-dsl|           quack-kernels and Liger's head for Hopper need it"
    "nvidia-cutlass-dsl-libs-base| nvidia-cutlass-dsl needs it"
    "nvidia-cutlass-dsl-libs-core| nvidia-cutlass-dsl-libs-base needs it"
    "nvidia-cutlass-dsl-libs-cu13| its compiler for CUDA 13"
    "apache-tvm-ffi|               quack-kernels needs it"
    "torch-c-dlpack-ext|           quack-kernels needs it"
)

usage() {
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}
folder= all= quack= list=
for word in "$@"; do
    case $word in
        --all) all=1 ;;
        --quack) quack=1 ;;
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
    for entry in "${QUACK[@]}"; do echo "quack     $(pinned "${entry%%|*}"): $(echo ${entry#*|})"; done
    exit
fi
mkdir -p "$folder"
packages=()
for entry in "${NEEDED[@]}" ${all:+"${OPTIONAL[@]}"} ${quack:+"${QUACK[@]}"}; do packages+=("$(pinned "${entry%%|*}")"); done
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" --only-binary=:all: \
    --implementation cp --python-version "$PYTHON_VERSION" \
    --platform "$PLATFORM" --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 "${packages[@]}"

kib() { echo $(($(stat -c %s "$1") / 1024)); }
total=0
for wheel in "$folder"/*.whl; do
    size=$(kib "$wheel")
    printf '%8d KiB  %s\n' "$size" "$(basename "$wheel")"
    if [ "$size" -gt $((1024 * MOST_MIB)) ]; then
        mkdir -p "$folder.parts"
        split -b ${PIECE_MIB}M "$wheel" "$folder.parts/$(basename "$wheel")."
        rm "$wheel"
        echo "              cut into $(ls "$folder.parts/$(basename "$wheel")."* | wc -l) pieces in $folder.parts"
    else total=$((total + size)); fi
done
printf '%8d KiB  in all, of at most %d that travel at once\n' "$total" $((1024 * MOST_MIB))
[ "$total" -le $((1024 * MOST_MIB)) ] || { echo "they do not travel at once" >&2; exit 1; }
