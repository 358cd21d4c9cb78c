#!/usr/bin/env bash
# All that needs a GPU, on a machine that has one and perhaps no network: `make gpu`. In stages; a stage that fails does
# not stop the next, and a second call goes on with those that are not done. RESULTS is where they and their logs go,
# with all logs once more in one file, logs.tar.gz.
#
#   PYTHON=python3      the interpreter, with torch and triton in it
#   WHEELS=.whl         a folder of wheels that it lacks; they go into build/gpu alone
#   RESULTS=benchmarks/results
#   STAGES="tests bench_step"   these alone, done or not; bench_step-2 is one of several of its name
#   ARGS="--clip-lora PATH --lorafusion PATH"   more arguments for the benchmarks
#   COMPLORA_REVISION=…  of the code, where there is no git checkout
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} results=${RESULTS:-benchmarks/results}
site=build/gpu/site logs=$results/logs done=$results/done
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
        tests/test_cuda_source.py tests/test_triton.py tests/test_kernels.py tests/test_block_kernels.py \
        tests/test_graphs.py tests/test_block.py tests/test_pooled.py
}

tune() { "$python" -m complora_kernels.tune; }

bench() {
    # shellcheck disable=SC2086
    "$python" -m pytest "benchmarks/$1.py" "${@:2}" -q -o faulthandler_timeout=3600 --results "$results" ${ARGS:-}
}

report() { "$python" -m benchmarks.report --results "$results"; }

pack() { tar -C "$results" -czf "$results/logs.tar.gz" logs done; }

# A name, the seconds it may take, the command. What takes long has stages of one case each: -k selects it.
all=(
    "wheels 60 wheels"
    "environment 60 environment"
    "extension 180 extension"
    "tests 240 tests"
    "tune 120 tune"
    "bench_layer 180 bench bench_layer"
    "bench_factors 40 bench bench_factors"
    "bench_accuracy 40 bench bench_accuracy"
    "bench_step-1 300 bench bench_step -k case-1"
    "bench_step-2 240 bench bench_step -k case-2"
    "bench_step-3 120 bench bench_step -k case-3"
    "bench_step-4 120 bench bench_step -k case-4"
    "bench_memory 60 bench bench_memory"
    "bench_train-1 360 bench bench_train -k until_trained"
    "bench_train-2 120 bench bench_train -k iterations"
    "report 30 report"
)
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
    elif [ -e "$done/$name" ] && [ "$name" != report ]; then
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
