#!/usr/bin/env bash
# All that needs a GPU, on a machine that has one and perhaps no network: `make gpu`. In stages, the most important ones
# first; a stage that fails does not stop the next, and a second call goes on with those that are not done for this
# revision and GPU, in a stage that was stopped with the shapes that have no rows yet. RESULTS is where they and their
# logs go, with all logs once more in one file, logs.tar.gz.
#
# The targets of benchmarks/targets.toml name the GPU that they are for, an NVIDIA H200: another one's figures stand
# beside them under its own name, and none of those targets is met or missed by them.
#
#   PYTHON=python3      the interpreter, with torch and triton in it
#   WHEELS=.whl         a folder of wheels that it lacks; they go into build/gpu alone
#   RESULTS=benchmarks/results
#   STAGES="tests bench_step"   these alone, done or not; bench_step-2 is one of several of its name
#   STAGES=tune         measures the plans of the widest benchmarks, which those that come later then run by
#   ARGS="--clip-lora PATH --lorafusion PATH"   more arguments for the benchmarks; --extra: also the baselines, many of them
#                       compiled, that no target asks for
#   COMPLORA_REVISION=…  of the code, where there is no git checkout
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} results=${RESULTS:-benchmarks/results}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader --id=0 2>/dev/null | tr -cs '[:alnum:]\n' -)
site=build/gpu/site logs=$results/logs

# As benchmarks/machine.py says it, before the packages that it imports are there: tables and results are not code.
revision() {
    local commit
    commit=$(git --git-dir=.git rev-parse --short=12 HEAD 2>/dev/null) || { echo "${COMPLORA_REVISION:-unknown}"; return; }
    git diff --quiet HEAD -- . ':!README.md' ':!benchmarks/results' || commit+=+
    echo "$commit"
}

done=$results/done/$(revision)-${gpu:-unknown}
mkdir -p "$logs" "$done"
export COMPLORA_PLANS=$(realpath "$logs")/plans.json # that the tuning measures and the benchmarks use
export PYTHONPATH="$PWD/$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

wheels() {
    local files=("$wheels"/*.whl)
    [ -e "${files[0]}" ] || { echo "no wheels in $wheels: nothing to install"; return 0; }
    "$python" -m pip install --no-index --no-deps --no-compile --upgrade --target "$site" "${files[@]}"
}

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

# A name, the seconds it may take, the command. What takes long has stages of some cases each: -k selects them. All of
# it is to take about ten minutes on an H200. These are estimates in seconds, of which none is measured yet:
#
#   wheels, environment             15    bench_factors          15    bench_layer-2     60
#   extension                       60    bench_accuracy         10    bench_train-2     40
#   tests                           60    bench_memory           25    bench_train-1     60
#   bench_layer-1                   30    bench_step-1, -2       70 each, most of it torch.compile
#   report                          10    bench_step-3, -4       30 each
#   bench_libraries                 15                                                   all: 600
all=(
    "wheels 60 wheels"
    "environment 60 environment"
    "extension 150 extension"
    "tests 150 tests"
    "tune 300 tune"
    "bench_layer-1 90 bench bench_layer -k 'backward and shape-1'"
    "bench_step-1 150 bench bench_step -k case-1"
    "bench_step-2 150 bench bench_step -k case-2"
    "bench_step-3 80 bench bench_step -k case-3"
    "bench_step-4 80 bench bench_step -k case-4"
    "bench_factors 40 bench bench_factors"
    "bench_accuracy 40 bench bench_accuracy"
    "bench_memory 60 bench bench_memory"
    "bench_libraries 60 bench bench_libraries"
    "bench_layer-2 120 bench bench_layer -k 'not (backward and shape-1)'"
    "bench_train-2 90 bench bench_train -k iterations"
    "bench_train-1 150 bench bench_train -k until_trained"
    "report 30 report"
)
set_up=" wheels environment extension " # always done: another machine may have this folder now
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "make gpu: torch in $python sees no GPU, expected PYTHON with a torch that does" >&2
    exit 2
fi
export -f wheels environment extension tests tune bench report
export python wheels results logs site

failed=() outcome=()
for entry in "${all[@]}"; do
    read -r name seconds command <<<"$entry"
    if [ -n "${STAGES:-}" ]; then
        [[ " $STAGES " == *" $name "* || " $STAGES " == *" ${name%-*} "* ]] || continue
    elif [ "$name" = tune ]; then
        continue # takes as long as all the rest
    elif [ -e "$done/$name" ] && [ "$name" != report ] && [[ "$set_up" != *" $name "* ]]; then
        outcome+=("$name: done before")
        continue
    fi
    echo "== $name"
    start=$SECONDS
    if timeout --kill-after=10 "$seconds" bash -e -o pipefail -c "$command" </dev/null >"$logs/$name.log" 2>&1; then
        touch "$done/$name"
        outcome+=("$name: done in $((SECONDS - start)) s")
    else
        code=$?
        failed+=("$name")
        [ $code = 124 ] && why="stopped after $seconds s" || why="failed with $code"
        outcome+=("$name: $why, see $logs/$name.log")
        tail -n 15 "$logs/$name.log"
    fi
    pack
done
printf '%s\n' "== make gpu" "${outcome[@]}"
"$python" -m benchmarks.targets --results "$results" || true
[ ${#failed[@]} = 0 ]
