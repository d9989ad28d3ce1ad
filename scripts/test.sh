#!/usr/bin/env bash
# Sets up as quickstart.sh does and runs the tests.
#
#   bash scripts/test.sh            the fast tier, at most 12 minutes on 2 cores
#   bash scripts/test.sh --all      everything
#   bash scripts/test.sh -k name    any other argument goes to pytest
#
# Test files are dealt to a process for each core, at most 4; TEST_PROCESSES=0 runs all in this one, for a debugger.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cores="$(python -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')"
exec python -m pytest -n "${TEST_PROCESSES:-$cores}" --dist loadfile "$@"
