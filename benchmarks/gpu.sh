#!/usr/bin/env bash
# Everything that a GPU can tell, in one command and under ten minutes: correctness first, then memory, then speed.
# Needs torch, triton, transformers and pytest; no network. Each stage has its own limit, and what it found stays.
#     bash benchmarks/gpu.sh              on a machine with a GPU
#     bash benchmarks/gpu.sh --dry-run    the same stages at tiny sizes on a CPU, in Triton's interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY=${1:-}
failed=()

stage() { # name, seconds, command...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if timeout --kill-after=10 "$limit" "$@"; then echo "== $name: done in $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "== $name: FAILED (exit status $?) after $((SECONDS - start)) s"
    fi
}

if [ "$DRY" = --dry-run ]; then
    export TRITON_INTERPRET=1 DPO_FAST_IMPL=torch CUDA_VISIBLE_DEVICES=
    save=--no-save
    stage tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_ops_sequence.py -k bitwise
    stage selftest 60 "$PYTHON" -c "import sys; from dpo_fast.selftest import main; sys.exit(main([]))"
    stage level1 30 "$PYTHON" -m benchmarks.level1 --N 16 --V 500 --rounds 1 $save
    stage sweep 60 "$PYTHON" -m benchmarks.sweep --kernel fwd --rounds 1 $save
    stage head 60 "$PYTHON" -m benchmarks.head --shape cpu-tiny --rounds 1 --only ours ours-fused eager $save
else
    "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
        echo "gpu.sh: torch sees no GPU here; use --dry-run to try the stages on a CPU" >&2
        exit 2
    }
    stage tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu
    if command -v compute-sanitizer >/dev/null; then
        stage memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 3 \
            "$PYTHON" -c "import sys; from dpo_fast.selftest import main; sys.exit(main([]))"
    else echo "== memcheck: left out, compute-sanitizer is not installed"; fi
    stage level1 40 "$PYTHON" -m benchmarks.level1
    stage head 150 "$PYTHON" -m benchmarks.head --shape bar --rounds 5
    stage sweep 110 "$PYTHON" -m benchmarks.sweep
fi
"$PYTHON" -m benchmarks.bars # what results/<device> now holds, next to what is asked

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (after $SECONDS s)"
    exit 1
fi
echo "all stages done in $SECONDS s; results in benchmarks/results/"
