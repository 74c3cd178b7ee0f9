#!/usr/bin/env bash
# Runs the tests of answering, batches, series, bundles and the node in a network that has loopback alone.
#
#   packaging/offline_suite.sh [PYTHON] [PYTEST ARGUMENTS]    (default: .venv's python, the folders below)
#
# The exit code is pytest's; 3 if all passed and something asked for a name or a route all the same. Needs unshare and
# mount (util-linux) and the right to make user namespaces; no root. Orthanc, where there is one, runs on loopback.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
shift || true
if [ "$#" -eq 0 ]; then
    set -- tests/infer tests/serve tests/dicom tests/report tests/bundle tests/cli tests/test_batch.py tests/offline
    # Real files and programs of the tests, fetched while there is a network unless `check.py` has fetched them before.
    while IFS= read -r variable; do
        export "${variable?}"
    done < <("$python" - <<'FETCH' | grep ^EDGEMED_TEST_
import sys
from pathlib import Path

sys.path.insert(0, "packaging")
import test_data, test_tools

for name, value in (test_data.fetch(Path(sys.executable)) | test_tools.fetch()).items():
    print(f"{name}={value}")
FETCH
    )
fi
report=$(mktemp)
trap 'rm -f "$report"' EXIT
code=0
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} unshare -rnm "$python" tests/offline/namespace.py "$report" \
    "$python" -m pytest -q "$@" || code=$?
"$python" - "$report" "$code" <<'CHECK'
import json, sys

told = json.load(open(sys.argv[1], encoding="utf-8"))
print(f"names asked for: {sorted(set(told['names'])) or 'none'}; packets without a route: {told['no_route']}")
sys.exit(int(sys.argv[2]) or (3 if told["names"] or told["no_route"] else 0))
CHECK
