#!/usr/bin/env bash
# Sets up and runs the study. Call it as often as you like: what is done is skipped, what was broken off goes on.
#   bash reproduce.sh [OPTION…]   the cells of Table 1, then the report; or share them out: sbatch --array=0-7 reproduce.sh
#   bash reproduce.sh quick       seven small cells on images made by code: ten minutes on two CPU cores, no download
#   bash reproduce.sh test …      the tests, on all cores; what follows goes to pytest
# Options; relative paths start at the folder of this file:
#   --preset P        paper, narrow, mini, quick or smoke  [paper where there is a GPU, else mini]
#   --datasets "A B"  names, folders or one folder with spaces  [cifar10 cifar100 svhn if they can be had; quick: shapes]
#   --losses "A B"    [contrastive hard simple hard-simple]
#   --taus "A B"      of the losses that have a temperature  [0.07 0.3 0.7 1.0]
#   --seeds N         seeds 0 … N-1  [$SEEDS, or 3; quick: 1]
#   --jobs N          runs at once  [$JOBS, or three on each GPU; without one, one a core with one thread each]
#   --data DIR, --results DIR  folders of downloads and of records; a cell that has a record is done  [data, results]
#   --dry-run         print the plan and each command, train nothing
#   -- …              all that follows goes to ctl.py, for example  -- --match-step
# The first call makes .venv beside this file (PYTHON names the interpreter; 3.10 or later).
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euf -o pipefail
trap 'exit 130' INT
stop() { echo "reproduce.sh: $1 (--help lists the options)" >&2; exit 2; }
check() { [[ "$2" =~ ^($3)$ ]] || stop "--$1 can't be '$2'"; }
# nproc alone would take OpenMP's number of threads for the number of cores.
cores() { echo "${SLURM_CPUS_PER_TASK:-$(env -u OMP_NUM_THREADS nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)}"; }

CDPATH="" cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[ -e ctl.py ] || { cd "${SLURM_SUBMIT_DIR:-.}" && [ -e ctl.py ]; } || stop "no ctl.py beside it" # Slurm runs a copy
mkdir -p runs

set_up() (
    if command -v flock > /dev/null; then flock 9; fi # tasks that start together set up one after the other
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        command -v "${PYTHON:=python3}" > /dev/null || stop "PYTHON: no such interpreter: $PYTHON"
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "PYTHON: $PYTHON is older than 3.10"
        "$PYTHON" -m venv --clear .venv
    fi
    if cmp -s requirements.txt .venv/installed.txt; then return; fi
    echo "installing requirements.txt into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
) 9> runs/.set-up.lock

# The cells of this task, a line each. On a CPU two runs of one thread do more than one run of two threads.
cells() {
    for ((seed = 0; seed < seeds; seed++)); do for name in "${datasets[@]}"; do for loss in $losses; do
        if [[ "$loss" =~ ^(contrastive|hard)$ ]]; then set -- $taus; else set -- ""; fi
        for tau; do printf -- '--loss %s%s --seed %s --dataset %q\n' "$loss" "${tau:+ --tau $tau}" "$seed" "$name"; done
    done; done; done | awk -v shares="$shares" -v share="$share" -v gpus="$gpus" 'NR % shares == share {
        print $0 (gpus > 0 ? " --device cuda:" n++ % gpus : " --device cpu --threads 1") }'
}

run_cell() {
    local cell="${1% --device *}" log status=0
    log="$logs/$(printf %s "${cell//--/}${more//--/}" | tr -cs 'a-zA-Z0-9.-' _ | cut -c 1-200).log"
    echo "start   $cell"
    eval ".venv/bin/python ctl.py $common $1$more" >> "$log" 2>&1 || status=$?
    case "$status" in
        0) echo "done    $cell ($(tail -n 9 "$log" | grep -o "is there already" || echo "$((SECONDS / 60)) min"))" ;;
        3) echo "busy    $cell (another process is at work on it)" ;;
        130) return 1 ;; # interrupted
        *) printf '%s\n' "FAILED  $cell (status $status), the end of $log:" "$(tail -n 5 "$log")" >&2; return 1 ;;
    esac
}

preset="" datasets="" losses="contrastive hard simple hard-simple" taus="0.07 0.3 0.7 1.0" data=data results=results
seeds="${SEEDS:-}" jobs="${JOBS:-}" dry="" more=""
while [ $# -gt 0 ]; do
    case "$1" in
        test) set_up; exec .venv/bin/python -m pytest -q -n "$(cores)" "${@:2}" test_ctl.py results ;;
        quick) preset=quick losses="contrastive hard simple" taus="0.3 0.7 1.0"; shift; continue ;;
        --dry-run) dry=yes; shift; continue ;;
        -h | --help) sed -n '2,/^if/s/^# \{0,1\}//p' reproduce.sh; exit 0 ;;
        --) [ $# -eq 1 ] || more="$(printf ' %q' "${@:2}")"; break ;;
        --preset | --datasets | --losses | --taus | --seeds | --jobs | --data | --results) ;;
        *) stop "unknown: $1" ;;
    esac
    [ $# -ge 2 ] && [ -n "${2// /}" ] || stop "$1 wants a value"
    printf -v "${1#--}" %s "$2"
    shift 2
done
case "$preset" in quick | smoke) : "${datasets:=shapes}" ;; esac
datasets="${datasets/#~\//$HOME/}" seeds="${seeds:-$([ "$preset" = quick ] && echo 1 || echo 3)}"
if [ -d "$datasets" ]; then datasets=("$datasets"); else datasets=($datasets); fi
check preset "$preset" "|paper|narrow|mini|quick|smoke"
for name in seeds ${jobs:+jobs}; do check "$name" "${!name}" "[1-9][0-9]{0,5}"; done
for name in $losses; do check losses "$name" "contrastive|hard|simple|hard-simple|triplet"; done
for name in $taus; do check taus "$name" "[0-9.e-]+"; done
for name in "${datasets[@]:-shapes}"; do [ -d "$name" ] || check datasets "$name" "cifar10|cifar100|svhn|shapes"; done
# Slurm tells a task the first index, the last and how many there are, but not which: there must be no gap.
shares="${SLURM_ARRAY_TASK_COUNT:-1}" first="${SLURM_ARRAY_TASK_MIN:-0}" share=$((${SLURM_ARRAY_TASK_ID:-0} - first))
((shares == ${SLURM_ARRAY_TASK_MAX:-0} - first + 1)) || stop "array with gaps: write a range, such as --array=0-7"

set_up
gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then : "${preset:=paper}" "${jobs:=$((3 * gpus))}"; else : "${preset:=mini}" "${jobs:=$(cores)}"; fi
if [ "$preset" = mini ]; then echo "preset mini: 5,000 images and 60 epochs, not the paper's protocol"; fi
have='import sys, ctl; sys.exit(ctl.one_line("left out", ctl.load_dataset, *sys.argv[1:]))'
[ ${#datasets[@]} -gt 0 ] || for name in cifar10 cifar100 svhn; do
    if [ -n "$dry" ] || .venv/bin/python -c "$have" "$name" "$data"; then datasets+=("$name"); fi
done
[ ${#datasets[@]} -gt 0 ] || stop "no data set can be had: take --datasets FOLDER or --datasets shapes"
common=$(printf -- '--preset %s --data %q --results %q' "$preset" "$data" "$results") count=$(cells | wc -l)
case "$preset" in paper) one=$((gpus > 0 ? 33 : 5400)) ;; narrow) one=120 ;; mini) one=15 ;; quick) one=2 ;; *) one=1 ;; esac # minutes
minutes=$(((count + jobs - 1) / jobs * one)) logs="runs/logs/$preset-${results//\//%}"
echo "plan: $((count)) cells of preset $preset on$(printf ' %q' "${datasets[@]}"), $seeds seed(s), $jobs at once," \
    "$gpus GPU(s); about $((minutes / 60)) h $((minutes % 60)) min, less what is done already; logs in $logs"
if [ -n "$dry" ] || [ "$count" -eq 0 ]; then # an array may have more tasks than there are cells
    cells | while IFS= read -r cell; do echo ".venv/bin/python ctl.py $common $cell$more"; done
    exit 0
fi
mkdir -p "$logs"
# glibc keeps freed memory: with 50,000 images on a CPU a step takes less time (results/SPEED.md).
export MALLOC_TOP_PAD_=134217728 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
export -f run_cell && export common more logs
cells | tr '\n' '\0' | xargs -0 -n 1 -P "$jobs" bash -c 'set -uo pipefail; run_cell "$1"' cell || failed=yes
.venv/bin/python results/report.py --results "$results" --preset "$preset" && [ -z "${failed:-}" ]
