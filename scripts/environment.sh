# Sourced by the other scripts: a virtual environment with this checkout in it, and `python` from there.
#
#   D2V_VENV   where it lies (default: .venv in this checkout); none: what is active is taken as it is
#   PYTHON     what makes it (default: python3; 3.10 to 3.12)
#   D2V_EXTRAS which extras of setup.py it gets (default: dev, which has all; quickstart.sh: none)
#
# The checkout is installed each time; its dependencies again when setup.py has changed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${D2V_VENV:-$root/.venv}"
case "$venv" in none | /*) ;; *) venv="$PWD/$venv" ;; esac
extras="${D2V_EXTRAS-dev}"

fail() { echo "error: $*" >&2; exit 1; }

make_venv() {
    "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
        fail "$("${PYTHON:-python3}" --version) is not supported; set PYTHON to a Python 3.10, 3.11 or 3.12"
    if [ ! -x "$venv/bin/python" ]; then
        echo "making $venv"
        "${PYTHON:-python3}" -m venv "$venv" || fail "no venv could be made in $venv; on Debian: apt-get install python3-venv"
    fi
    export PATH="$venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

    wanted="$(sha256sum "$root/setup.py" | cut -d' ' -f1)"
    read -r made made_extras < <(cat "$venv/.d2v_setup" 2>/dev/null) || true
    if [[ "${made:-}" != "$wanted" || -n "$extras" && "${made_extras:-}" != "$extras" ]]; then
        echo "installing the dependencies into $venv (torch is large: one to ten minutes)"
        python -m pip install --quiet "setuptools>=70.1,<82" wheel
        python -m pip install --quiet --no-build-isolation -e "$root${extras:+[$extras]}"
        echo "$wanted $extras" > "$venv/.d2v_setup"
    else
        python -m pip install --quiet --no-build-isolation --no-deps -e "$root"
    fi
}

[ "$venv" = none ] || make_venv
cd "$root"
