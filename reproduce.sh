#!/usr/bin/env bash
# Sets up and runs, from any folder, as often as you like; what is done is skipped, what was broken off goes on:
#   bash reproduce.sh [OPTION…]   every cell of Table 1, then the report: tables, figures, verdicts in results/
#   bash reproduce.sh quick       the ten cells, small, on images made by code: ten minutes on two CPU cores, no download
#   bash reproduce.sh test        the tests
# Options:
#   --preset P          paper, narrow, mini, quick or smoke  [paper where there is a GPU, else mini]
#   --datasets "A B"    [cifar10 cifar100 svhn]; of these defaults, one that can't be had is left out, and that is said
#   --losses "A B"      [contrastive hard simple hard-simple]
#   --taus "A B"        of the losses that have a temperature [0.07 0.3 0.7 1.0]
#   --seeds N           seeds 0 … N-1                         [$SEEDS, or 3]
#   --jobs N            runs at once      [a CPU: one a core, one thread each; GPUs: --per-gpu times their number]
#   --per-gpu N         runs at once on each GPU              [3]
#   --results DIR       where records are or go               [results; those that came with it count as done]
#   --dry-run           print the plan and each command, train nothing
#   -- …                all that follows goes to ctl.py, for example  -- --match-step
# As a Slurm array, each task takes its share of the cells:  sbatch --array=0-7 --gres=gpu:1 reproduce.sh
# The first call makes .venv beside this file (PYTHON names the interpreter; 3.10 or later).
set -euf -o pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ ! -e ctl.py ] && [ -n "${SLURM_SUBMIT_DIR:-}" ]; then cd "$SLURM_SUBMIT_DIR"; fi # Slurm runs a copy of this file
if [ ! -e ctl.py ]; then echo "reproduce.sh: ctl.py is not beside it: run it from where it belongs" >&2; exit 2; fi
# glibc keeps freed memory: a step takes less time (results/SPEED.md); results don't change.
export MALLOC_TOP_PAD_=134217728 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

usage() { sed -n '2,20s/^# \{0,1\}//p' reproduce.sh; }
stop() { echo "reproduce.sh: $1" >&2; exit 2; }

set_up() {
    local base="${PYTHON:-python3}"
    mkdir -p runs
    exec 9> runs/.set-up.lock # tasks that start together set up one after the other
    if command -v flock > /dev/null; then flock 9; fi
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            stop "$base is not Python 3.10 or later: name one with PYTHON=…"
        "$base" -m venv --clear .venv
    fi
    if ! cmp -s requirements.txt .venv/installed.txt; then
        echo "installing requirements.txt into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/installed.txt
    fi
    exec 9>&-
}

# The cells, a line each, one seed of everything first.
cells() {
    local seed dataset loss tau
    for ((seed = 0; seed < seeds; seed++)); do
        for dataset in $datasets; do
            for loss in $losses; do
                case "$loss" in
                    contrastive | hard) for tau in $taus; do echo "--dataset $dataset --loss $loss --tau $tau --seed $seed"; done ;;
                    *) echo "--dataset $dataset --loss $loss --seed $seed" ;;
                esac
            done
        done
    done
}

# Of all cells, a line each, those of this task of a Slurm array.
share() {
    local step="${SLURM_ARRAY_TASK_STEP:-1}"
    awk -v count="${SLURM_ARRAY_TASK_COUNT:-1}" -v task=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / step)) \
        'NR % count == task % count'
}

# Before each cell a line that says where it runs. On a CPU with one thread: two runs at once get more images through than one
# run with two (README, Cost and time).
place() { awk -v gpus="$gpus" '{ print (gpus > 0 ? "--device cuda:" NR % gpus : "--device cpu --threads 1"); print }'; }

# One cell: where it runs, and its arguments. A failing one doesn't stop the others.
run_cell() {
    local log="$logs/$(tr -cs 'a-zA-Z0-9.-' _ <<< "$2$more").log" status=0 extra
    eval "extra=($more)" # quoted by printf %q below
    # shellcheck disable=SC2086
    .venv/bin/python ctl.py --preset "$preset" --results "$results" $1 $2 ${extra[@]+"${extra[@]}"} > "$log" 2>&1 || status=$?
    case "$status" in
        0) if grep -q "is there already" "$log"; then echo "there   $2 (its record is in $results already)"; else echo "done    $2"; fi ;;
        3) echo "busy    $2 (another process is at work on it)" ;;
        *) echo "FAILED  $2 (status $status)"; echo "$2|$log" >> "$failed"; return 1 ;;
    esac
}

table() {
    local status=0 dataset reachable="" count hours
    gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
    if [ -z "$preset" ]; then
        preset=$([ "$gpus" -gt 0 ] && echo paper || echo mini)
        if [ "$preset" = mini ]; then echo "There is no GPU: this runs the mini preset (5,000 images, 60 epochs), not the paper's protocol."; fi
    fi
    if [ -z "$jobs" ]; then jobs=$([ "$gpus" -gt 0 ] && echo $((gpus * per_gpu)) || getconf _NPROCESSORS_ONLN); fi
    if [ -z "$datasets" ]; then
        for dataset in cifar10 cifar100 svhn; do
            if [ -n "$dry" ] || .venv/bin/python -c '
import sys, ctl
try: ctl.load_dataset(sys.argv[1])
except ctl.Stop as error: sys.exit("left out: " + str(error))' "$dataset"; then reachable="$reachable $dataset"; fi
        done
        datasets="${reachable:-shapes}"
        if [ -z "$reachable" ]; then echo "None of the data sets can be had: this runs on 'shapes', images made by code."; fi
    fi
    count=$(cells | share | wc -l)
    case "$preset" in paper) hours=0.15 ;; narrow) hours=2.5 ;; mini) hours=0.25 ;; quick) hours=0.03 ;; *) hours=0.003 ;; esac
    echo "plan: $((count)) cells of preset $preset on$(printf ' %s' $datasets), $seeds seed(s), $jobs at once on $([ "$gpus" -gt 0 ] && echo "$gpus GPU(s)" || echo "the CPU");" \
        "estimate: $(awk "BEGIN { printf \"%.1f\", $count * $hours / ($jobs < $count ? $jobs : $count + ($count == 0)) }") hours, less what is done already"
    if [ "$count" -eq 0 ]; then return 0; fi # an array of more tasks than cells
    if [ -n "$dry" ]; then
        cells | share | place | paste -d ' ' - - | while IFS= read -r line; do
            printf '.venv/bin/python ctl.py --preset %s --results %q %s%s\n' "$preset" "$results" "$line" "$more"
        done
        return 0
    fi
    logs="runs/logs" failed="runs/logs/failed-${SLURM_ARRAY_TASK_ID:-0}.txt"
    mkdir -p "$logs"
    export -f run_cell
    export preset results more logs failed
    rm -f "$failed"
    cells | share | place | tr '\n' '\0' | xargs -0 -n 2 -P "$jobs" bash -c 'set -uo pipefail; run_cell "$1" "$2"' cell || status=1
    .venv/bin/python ctl.py --report --results "$results" --preset "$preset" || status=1
    if [ -e "$failed" ]; then
        while IFS='|' read -r cell log; do printf '\nFAILED %s, the end of %s:\n' "$cell" "$log"; tail -n 5 "$log"; done < "$failed" >&2
    fi
    return "$status"
}

preset="" datasets="" losses="contrastive hard simple hard-simple" taus="0.07 0.3 0.7 1.0" seeds="${SEEDS:-3}" jobs="${JOBS:-}"
per_gpu=3 results=results dry="" more=""
case "${1:-}" in
    test) set_up; exec .venv/bin/python -m pytest -q "${@:2}" test_ctl.py ;;
    quick) preset=quick datasets=shapes seeds="${SEEDS:-1}"; shift ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry=yes; shift; continue ;;
        --) shift; [ $# -eq 0 ] || more=$(printf ' %q' "$@"); break ;;
        --preset | --datasets | --losses | --taus | --seeds | --jobs | --per-gpu | --results)
            [ $# -ge 2 ] && [ -n "${2// /}" ] || stop "$1 wants a value (--help lists the options)"
            name="${1#--}"; printf -v "${name//-/_}" %s "$2"; shift 2 ;;
        *) stop "unknown: $1 (--help lists the options)" ;;
    esac
done
for name in seeds jobs per_gpu; do
    [ "$name" = jobs ] && [ -z "$jobs" ] || [[ "${!name}" =~ ^[1-9][0-9]{0,5}$ ]] || stop "--${name/_/-} must be a whole number above 0, not ${!name}"
done
[[ "$preset" =~ ^(|paper|narrow|mini|quick|smoke)$ ]] || stop "--preset must be paper, narrow, mini, quick or smoke, not $preset"
for loss in $losses; do
    [[ "$loss" =~ ^(contrastive|hard|simple|hard-simple|triplet)$ ]] || stop "--losses: there is no loss $loss"
done
set_up
table
