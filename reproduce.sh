#!/usr/bin/env bash
# Sets up and runs, from any folder, as often as you like:
#   bash reproduce.sh test     the tests
#   bash reproduce.sh quick    the ten cells of Table 1 on images made by code: ten minutes on two CPU cores, no download
# The first call makes .venv beside this file (PYTHON names the interpreter; 3.10 or later). JOBS: runs at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
# glibc keeps freed memory: a step takes a tenth to a fifth less time (results/SPEED.md); results don't change.
export MALLOC_TOP_PAD_=134217728 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

usage() { sed -n '2,5s/^# \{0,1\}//p' reproduce.sh; }

set_up() {
    local base="${PYTHON:-python3}"
    if ! .venv/bin/python -c '' 2>/dev/null; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            { echo "reproduce.sh: $base is not Python 3.10 or later: name one with PYTHON=…" >&2; exit 2; }
        "$base" -m venv --clear .venv
    fi
    if ! cmp -s requirements.txt .venv/installed.txt; then
        echo "installing requirements.txt into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed.txt
    fi
}

# The ten cells of Table 1, a line each.
cells() {
    for loss in contrastive hard; do
        for tau in 0.07 0.3 0.7 1.0; do echo "--loss $loss --tau $tau"; done
    done
    echo "--loss simple"
    echo "--loss hard-simple"
}

quick() {
    # One thread each: two runs at once get more images through than one run with two threads (results/SPEED.md).
    local jobs="${JOBS:-$(getconf _NPROCESSORS_ONLN)}" status=0
    echo "quick: ten cells on 'shapes' (made by code, no download), one seed, $jobs at once with one thread each"
    mkdir -p runs/quick
    # A cell with a record is done: it says so and takes a few seconds. One that fails doesn't stop the others.
    cells | xargs -P "$jobs" -I{} bash -c '
        log="runs/quick/$(tr -d " " <<< "$1").log"
        if .venv/bin/python ctl.py --preset quick --threads 1 $1 > "$log" 2>&1; then echo "done    $1"
        else echo "FAILED  $1: $(tail -n 1 "$log")" >&2; exit 1; fi' cell {} || status=1
    .venv/bin/python ctl.py --report --preset quick
    return "$status"
}

case "${1:-}" in
    test) set_up; exec .venv/bin/python -m pytest -q "${@:2}" test_ctl.py ;;
    quick) [ $# -eq 1 ] || { usage >&2; exit 2; }; set_up; quick ;;
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
