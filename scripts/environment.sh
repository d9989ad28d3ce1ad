# Sourced by the other scripts: a virtual environment with this checkout in it, and `python` from there.
#
#   D2V_VENV   where it lies (default: .venv in this checkout); none: what is active is taken as it is
#   PYTHON     what makes it (default: python3; 3.10 to 3.12)
#   D2V_EXTRAS which extras of setup.py it gets (default: dev, which has all; quickstart.sh: none)
#
# The checkout is installed each time; its dependencies again when setup.py has changed. Paths of key=value arguments are
# the caller's, who may stand elsewhere; out=, init= and data=FOLDER stand for OUT, INIT and DATA where those are not set.

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

# absolute PATHS: paths or patterns, joined by ::, as they are seen from here; URLs stay.
absolute() {
    local rest="$1::" part whole=""
    while [ -n "$rest" ]; do
        part="${rest%%::*}" rest="${rest#*::}"
        case "$part" in "" | null | /* | "~"* | *://* | pipe:* | "{"*": "*) ;; *) part="$PWD/$part" ;; esac
        whole+="${whole:+::}$part"
    done
    echo "$whole"
}

for argument in "$@"; do # the arguments of the script that sources this
    shift
    key="${argument%%=*}" value="${argument#*=}"
    if [ ! "$PWD" -ef "$root" ]; then
        case "$argument" in data=* | init=* | out=* | remote.cache=* | task.vocabulary=* | task.test=*/* | *.data.tokenizer=*)
            value="$(absolute "$value")" ;;
        esac
    fi
    case "$key" in
        out) OUT="${OUT:-$value}" ;;
        init) [ "$value" = null ] || INIT="${INIT:-$value}" ;;
        data) [ ! -d "$value" ] || DATA="${DATA:-$value}" ;;
    esac
    [[ "$argument" != *=* ]] || argument="$key=$value"
    set -- "$@" "$argument"
done

[ "$venv" = none ] || make_venv
cd "$root"
