#!/usr/bin/env bash
# What a GPU can tell, in one command and within the minutes given: correctness first, then a whole step, then its parts.
# Needs torch, triton, transformers and pytest; no network. GPU.md says what each number decides.
#     bash benchmarks/gpu.sh --minutes 10                  on a machine with a GPU
#     bash benchmarks/gpu.sh --minutes 10 --wheels DIR     with packages brought along (wheels.sh), installed beside
#     bash benchmarks/gpu.sh --dry-run                     the same stages at tiny sizes on a CPU, in Triton's interpreter
# --commit HASH: the commit of this checkout, where it travels without its repository; --allow-dirty: save regardless.
# --only STAGE,...: these stages alone; --fail STAGE,...: these stages fail, to see that the script notices.
# A stage gets its share of the minutes that are left, so what one saves the next ones have. Each saves or prints what it
# has found as it goes: one that is stopped loses only the rest. Status 1 when a stage failed, 2 when none could begin.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
GPU_TESTS=(tests/kernels/test_gpu.py tests/test_attention.py)
STAGES=(tests memcheck train_step gemm head level1 attention sweep)
declare -A SHARE=([tests]=28 [memcheck]=6 [train_step]=28 [gemm]=3 [head]=16 [level1]=4 [attention]=7 [sweep]=8)
minutes=10 dry= wheels= only= fail= allow=()

usage() {
    [ $# -gt 0 ] && echo "gpu.sh: $*" >&2
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    echo "stages: ${STAGES[*]}" >&2
    exit 2
}
known() { # each name of a,b,c is a stage
    local name
    for name in ${1//,/ }; do [[ " ${STAGES[*]} " == *" $name "* ]] || usage "there is no stage '$name'"; done
}
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 ;;
        --allow-dirty) allow=(--allow-dirty) ;;
        --minutes | --wheels | --commit | --only | --fail)
            [ $# -gt 1 ] || usage "$1 needs a value"
            case $1 in
                --minutes) [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage "--minutes takes a number, got '$2'"; minutes=$2 ;;
                --wheels) [ -d "$2" ] || usage "there is no folder '$2'"; wheels=$2 ;;
                --commit) export DPO_FAST_COMMIT=$2 ;;
                --only) known "$2"; only=$2 ;;
                --fail) known "$2"; fail=$2 ;;
            esac
            shift ;;
        -h | --help) usage ;;
        *) usage "unknown argument '$1'" ;;
    esac
    shift
done
listed() { [[ ",$1," == *",$2,"* ]]; } # whether a,b,c has a name

failed=() left=0 end=$(awk -v minutes="$minutes" 'BEGIN { printf "%d", 60 * minutes }')
for name in "${STAGES[@]}"; do
    if [ -z "$only" ] || listed "$only" "$name"; then left=$((left + SHARE[$name])); fi
done

stage() { # name, command...: run it within its share of what is left
    local name=$1 start=$SECONDS limit status
    shift
    if [ -n "$only" ] && ! listed "$only" "$name"; then return; fi
    limit=$(((end - SECONDS) * SHARE[$name] / left))
    if [ "$limit" -lt 1 ] && [ "$SECONDS" -lt "$end" ]; then limit=1; fi
    left=$((left - SHARE[$name]))
    if listed "$fail" "$name"; then set -- "$PYTHON" -c "import sys; sys.exit('this failure was asked for')"; fi
    echo "== $name: $limit s at most"
    if [ "$limit" -lt 1 ]; then
        failed+=("$name")
        echo "== $name: FAILED, no time is left"
        return
    fi
    timeout --kill-after=5 "$limit" "$@"
    status=$?
    if [ $status = 0 ]; then echo "== $name: done in $((SECONDS - start)) s"
    else
        failed+=("$name")
        [ $status = 124 ] || [ $status = 137 ] && echo "== $name: its time is up; what it printed and saved stays"
        echo "== $name: FAILED (exit status $status) after $((SECONDS - start)) s"
    fi
}
leave_out() { # name, reason
    if [ -n "$only" ] && ! listed "$only" "$1"; then return; fi
    left=$((left - SHARE[$1]))
    if listed "$fail" "$1"; then failed+=("$1"); fi
    echo "== $1: left out, $2"
}

export PYTHONUNBUFFERED=1 # so that what is stopped has printed
if [ -n "$wheels" ]; then
    beside=$(mktemp -d)
    trap 'rm -rf "$beside"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$beside" "$wheels"/*.whl || exit 2
    export PYTHONPATH=$beside${PYTHONPATH:+:$PYTHONPATH}
fi
pytest=("$PYTHON" -m pytest -p no:cacheprovider)
# Half of the tests' time is compilation, on one core each
parallel=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then parallel=(-n "$(($(nproc) < 12 ? ($(nproc) + 1) / 2 : 6))"); fi
selftest="import sys; from dpo_fast.selftest import main; sys.exit(main([]))"

if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1 DPO_FAST_IMPL=torch CUDA_VISIBLE_DEVICES=
    save=(--no-save)
    # the GPU's tests can be collected, and are not none; then one test by itself
    stage tests bash -c '"$@" -qq -m gpu --collect-only && "${@:1:5}" -q tests/ops/test_sequence.py -k bitwise' \
        tests "${pytest[@]}" "${GPU_TESTS[@]}"
    stage memcheck "$PYTHON" -c "$selftest"
    stage train_step "$PYTHON" -m benchmarks.train_step --smoke "${save[@]}"
    stage gemm "$PYTHON" -m benchmarks.gemm "${save[@]}"
    stage head "$PYTHON" -m benchmarks.head --shape cpu-tiny --rounds 1 --only ours ours-fused eager "${save[@]}"
    stage level1 "$PYTHON" -m benchmarks.level1 --N 16 --V 500 --rounds 1 "${save[@]}"
    stage attention "$PYTHON" -m benchmarks.attention "${save[@]}"
    stage sweep "$PYTHON" -m benchmarks.sweep --kernel fwd --rounds 1 "${save[@]}"
else
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
        echo "gpu.sh: torch sees no GPU here; use --dry-run to try the stages on a CPU" >&2
        exit 2
    }
    save=("${allow[@]}")
    if [ ${#allow[@]} = 0 ]; then
        commit=$("$PYTHON" -m benchmarks.provenance) || {
            echo "gpu.sh: results would not name their code ($commit): commit it, or give --commit or --allow-dirty" >&2
            exit 2
        }
        echo "measuring commit $commit"
    fi
    stage tests "${pytest[@]}" -v --tb=short -m gpu "${parallel[@]}" "${GPU_TESTS[@]}"
    if command -v compute-sanitizer >/dev/null; then
        stage memcheck compute-sanitizer --tool memcheck --error-exitcode 3 "$PYTHON" -c "$selftest"
    else leave_out memcheck "compute-sanitizer is not installed"; fi
    stage train_step "$PYTHON" -m benchmarks.train_step --shape 1b --steps 4 --warmup 2 "${save[@]}"
    stage gemm "$PYTHON" -m benchmarks.gemm --rounds 5 "${save[@]}"
    stage head "$PYTHON" -m benchmarks.head --shape bar llama3-1b-chat qwen3-0.6b-chat gemma2-2b-chat \
        --tile-mib 256 1024 2048 --rounds 5 "${save[@]}"
    stage level1 "$PYTHON" -m benchmarks.level1 "${save[@]}"
    stage attention "$PYTHON" -m benchmarks.attention "${save[@]}"
    stage sweep "$PYTHON" -m benchmarks.sweep --rounds 5 "${save[@]}"
    # what results/<device> now holds, next to what is asked: a bar that is missed is a finding, not a failed stage
    "$PYTHON" -m benchmarks.bars || echo "== bars: says no (status $?), see above"
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (after $SECONDS s)"
    exit 1
fi
echo "all stages done in $SECONDS s${dry:+; a dry run saves nothing}"
