#!/usr/bin/env bash
# Sets up as quickstart.sh does and runs the tests.
#
#   bash scripts/test.sh            the fast tier, at most 12 minutes on 2 cores
#   bash scripts/test.sh --all      everything
#   bash scripts/test.sh -k name    any other argument goes to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m pytest "$@"
