#!/usr/bin/env bash
# All that needs a GPU, on a machine that has one and perhaps no network: `make gpu`, twice. In stages, the most
# important ones first, within a limit of seconds for each call: a stage begins where what it is to take fits what is
# left. The first call takes 240 s at most: is every kernel right at real shapes, and what does each take alone, in one
# program (`benchmarks.gpu`), which needs none of the packages that benchmarks compare with. The second takes 500 s:
# layers and training steps, and what torch.compile makes of others last. A stage that fails does not stop the next;
# every call goes on with what is not done for this revision and GPU, in a stage that was stopped with what has no rows
# yet. RESULTS is where they and their logs go, with all logs once more in one file, logs.tar.gz.
#
# It needs a C compiler and Python's headers, for Triton, and nvcc for the extension; `make gpu-cache`, on a machine
# without a GPU, compiles the kernels of the first call beforehand, so that it compiles none.
#
# The targets of benchmarks/targets.toml name the GPU that they are for, an NVIDIA H200: another one's figures stand
# beside them under its own name, and none of those targets is met or missed by them.
#
#   PYTHON=python3      the interpreter, with torch and triton in it
#   LIMIT=240           seconds that this call may take; without it 240, and 500 from the second call on
#   WHEELS=.whl         a folder of wheels that it lacks; they go into build/gpu alone
#   GPU_CACHE=build/gpu-cache/kernels.zip   what `make gpu-cache` has packed, where it is there
#   RESULTS=benchmarks/results
#   STAGES="tests bench_step"   these alone, done or not, without a limit; bench_step-2 is one of several of its name
#   STAGES=tune         measures the plans of the widest benchmarks, which those that come later then run by
#   ARGS="--clip-lora PATH --lorafusion PATH"   more arguments for the benchmarks; --extra: also the baselines, many of them
#                       compiled, that no target asks for
#   COMPLORA_REVISION=…  of the code, where there is no git checkout
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} results=${RESULTS:-benchmarks/results}
cache=${GPU_CACHE:-build/gpu-cache/kernels.zip} closing=15 # seconds for packing the logs and the targets
"$python" -m benchmarks.gpu.environment # what Triton lacks is said before anything else
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null | tr -cs '[:alnum:]\n' -)
site=build/gpu/site logs=$results/logs

# As benchmarks/machine.py says it, before the packages that it imports are there: tables and results are not code.
revision() {
    local commit
    commit=$(git --git-dir=.git rev-parse --short=12 HEAD 2>/dev/null) || { echo "${COMPLORA_REVISION:-unknown}"; return; }
    git diff --quiet HEAD -- . ':!docs/speed.md' ':!docs/overview.png' ':!benchmarks/results' || commit+=+
    echo "$commit"
}

done=$results/done/$(revision)-${gpu:-unknown}
mkdir -p "$logs" "$done"
[ -e "$done/called" ] && usual=500 || usual=240
[ -z "${STAGES:-}" ] || usual=100000
limit=${LIMIT:-$usual}
touch "$done/called"
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/gpu/triton}
export COMPLORA_PLANS=$(realpath "$logs")/plans.json # that the tuning measures and the benchmarks use
export PYTHONPATH="$PWD/$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

wheels() {
    local files=("$wheels"/*.whl)
    [ -e "${files[0]}" ] || { echo "no wheels in $wheels: nothing to install"; return 0; }
    "$python" -m pip install --no-index --no-deps --no-compile --upgrade --target "$site" "${files[@]}"
}

first() { "$python" -m benchmarks.gpu --results "$results" --limit "$seconds" --cache "$cache"; }

environment() {
    nvidia-smi
    "$python" -m benchmarks.machine | tee "$logs/machine.json"
    "$python" -m complora_kernels.backends
}

extension() { "$python" setup.py build_ext --inplace; }

tests() {
    local parallel=()
    ! "$python" -c "import xdist" 2>/dev/null || parallel=(--numprocesses=4 --dist=loadfile)
    "$python" -m pytest -q --benchmark-disable "${parallel[@]}" \
        tests/backends/test_cuda_source.py tests/backends/test_triton.py tests/kernels/test_kernels.py tests/kernels/test_block_kernels.py \
        tests/test_graphs.py tests/modules/test_block.py tests/modules/test_last_block.py
}

tune() { "$python" -m complora_kernels.tune --model-shapes ViT-B-16 --batch 256 32 --rank 16; }

bench() {
    # A warning of versions that nobody has tried together costs no figure.
    # shellcheck disable=SC2086
    "$python" -m pytest "benchmarks/$1.py" "${@:2}" -q -W default -o faulthandler_timeout=3600 \
        --results "$results" --go-on ${ARGS:-}
}

report() { "$python" -m benchmarks.report --results "$results"; }

pack() { tar -C "$results" -czf "$results/logs.tar.gz" logs done; }

# A name, the seconds that it is to take on an H200, those after which it is stopped, the command. What takes long has
# stages of some cases each: -k selects them. None of the estimates is measured yet.
all=(
    "wheels 10 60 wheels"
    "first 60 225 first"
    "environment 20 60 environment"
    "extension 60 150 extension"
    "bench_layer-1 30 90 bench bench_layer -k 'backward and shape-1' --compiled without"
    "bench_step-1 30 80 bench bench_step -k case-1 --compiled without"
    "bench_step-2 30 80 bench bench_step -k case-2 --compiled without"
    "bench_step-3 30 80 bench bench_step -k case-3"
    "bench_step-4 30 80 bench bench_step -k case-4"
    "bench_factors 15 40 bench bench_factors"
    "bench_accuracy 10 40 bench bench_accuracy"
    "bench_memory 25 60 bench bench_memory"
    "bench_layer-2 60 120 bench bench_layer -k 'not (backward and shape-1)'"
    "tests 60 150 tests"
    "tune 300 600 tune"
    "bench_libraries 15 60 bench bench_libraries"
    "bench_train-2 40 90 bench bench_train -k iterations"
    "bench_train-1 60 150 bench bench_train -k until_trained"
    "bench_layer-3 20 60 bench bench_layer -k 'backward and shape-1' --compiled only"
    "bench_step-5 60 150 bench bench_step -k case-1 --compiled only"
    "bench_step-6 60 150 bench bench_step -k case-2 --compiled only"
    "report 10 30 report"
)
set_up=" wheels environment extension " # always done: another machine may have this folder now
waiting=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "make gpu: torch in $python sees no GPU, expected PYTHON with a torch that does" >&2
    exit 2
fi
export -f wheels first environment extension tests tune bench report
export python wheels results logs site cache seconds=

failed=() outcome=()
for entry in "${all[@]}"; do
    read -r name estimate seconds command <<<"$entry"
    if [ -n "${STAGES:-}" ]; then
        [[ " $STAGES " == *" $name "* || " $STAGES " == *" ${name%-*} "* ]] || continue
    elif [ "$name" = tune ]; then
        continue # takes as long as all the rest
    elif [ -e "$done/$name" ] && [ "$name" != report ] && [[ "$set_up" != *" $name "* ]]; then
        outcome+=("$name: done before")
        continue
    fi
    left=$((limit - closing - SECONDS))
    if [ "$estimate" -gt $left ]; then
        waiting+=("$name")
        outcome+=("$name: waits for the next call: it is to take $estimate s, $left s are left")
        continue
    fi
    [ "$seconds" -le $left ] || seconds=$left
    echo "== $name"
    start=$SECONDS
    timeout --kill-after=5 "$seconds" bash -e -o pipefail -c "$command" </dev/null >"$logs/$name.log" 2>&1
    code=$?
    if [ $code = 0 ]; then
        touch "$done/$name"
        outcome+=("$name: done in $((SECONDS - start)) s")
    elif [ $code = 3 ] && [ "$name" = first ]; then
        waiting+=("$name")
        outcome+=("$name: goes on in the next call, see $logs/$name.log")
    else
        failed+=("$name")
        [ $code = 124 ] && why="stopped after $seconds s" || why="failed with $code"
        outcome+=("$name: $why, see $logs/$name.log")
    fi
    [ $code = 0 ] && [ "$name" != first ] || tail -n 15 "$logs/$name.log"
    pack
done
printf '%s\n' "== make gpu, $SECONDS s" "${outcome[@]}"
[ ${#waiting[@]} = 0 ] || echo "make gpu again goes on with: ${waiting[*]}"
"$python" -m benchmarks.targets --results "$results" || true
[ ${#failed[@]} = 0 ]
