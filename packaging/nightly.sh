#!/bin/sh
# The long forms of the robustness tests: 100,000 fuzzed inputs, every n of every fault loop, the tests marked slow.
#
#   sh packaging/nightly.sh [INPUTS] [SEED]      about seven minutes on two cores
#
# PYTHON: one with edgemed[dev]; default: .venv/bin/python as `check.py` leaves it, else python3.
# The seed is the date unless it is given, so that each night draws other inputs. Inputs that are findings, or that
# crashed a decoder in its child, are kept in .cache/fuzz. Exit code 0 only if nothing was found.
set -u
cd "$(dirname "$0")/.." || exit 1
inputs=${1:-100000}
seed=${2:-$(date +%Y%m%d)}
python=.venv/bin/python
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}
if ! "$python" -c "import edgemed, hypothesis, pynetdicom, pytest" 2>/dev/null; then
    echo "$python has no edgemed[dev]; run python3 packaging/check.py first, or name another with PYTHON" >&2
    exit 1
fi
export EDGEMED_NIGHTLY=1 OMP_NUM_THREADS=1
failed=""

step() {
    name=$1
    shift
    echo "== $name"
    "$@" || failed="$failed; $name"
}

step "$inputs inputs, seed $seed" "$python" tests/robustness/harness.py "$inputs" --seed "$seed" --found .cache/fuzz
step "fault loops, every n" "$python" tests/robustness/loops.py
step "disk, memory, clocks, bombs" "$python" -m pytest -q tests/robustness/test_machine.py tests/robustness/test_bombs.py
step "slow tests" "$python" -m pytest -q -m slow tests/bundle tests/serve tests/dicom
if "$python" -c "import atheris" 2>/dev/null; then
    for target in manifest config prompt volume header; do
        step "atheris, $target" "$python" tests/robustness/harness.py --atheris "$target" \
            -max_total_time=120 -artifact_prefix=.cache/fuzz/ -print_final_stats=1 -verbosity=0
    done
else
    echo "== atheris is not installed (pip install atheris); its part is left out"
fi
if [ -n "$failed" ]; then
    echo "failed: ${failed#; }"
    exit 1
fi
echo "nothing was found"
