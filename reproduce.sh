#!/usr/bin/env bash
# Sets up and runs the study. Call it as often as you like: what is done is skipped, what was broken off goes on.
#   bash reproduce.sh [OPTION…]   the cells of Table 1, then the report; or as tasks: sbatch --array=0-7 reproduce.sh
#   bash reproduce.sh quick       seven small cells on images made by code: ten minutes on two CPU cores, no data set
#   bash reproduce.sh test …      the tests, on all cores; what follows goes to pytest
# Options; relative paths start at the folder of this file:
#   --preset P        paper, narrow, mini, quick or smoke  [paper where there is a GPU, else mini]
#   --datasets "A B"  names, folders or one folder with spaces  [cifar10 cifar100 svhn if they can be had; quick: waves]
#   --losses "A B"    [contrastive hard simple hard-simple]
#   --taus "A B"      of the losses that have a temperature  [0.07 0.3 0.7 1.0]
#   --seeds N         seeds 0 … N-1  [$SEEDS, or 3; quick: 1]
#   --jobs N          runs at once  [$JOBS, or one on each GPU; without one, one a core with one thread each]
#   --data DIR        folder of downloads  [data]
#   --out DIR         folder of the table: records, checkpoints, logs; a cell that has a record there is done  [runs]
#   --dry-run         print the plan and each command, install and train nothing
#   -- …              all that follows goes to ctl.py, for example  -- --match-step
# Exit status: 0 done, 1 a run failed, 2 wrong use, 3 another process runs some of the cells, 130 interrupted.
# The first call makes .venv beside this file (PYTHON names the interpreter; 3.10 or later).
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set -euf -o pipefail
stop() { echo "reproduce.sh: $1 (--help lists the options)" >&2; exit 2; }
check() { [[ "$2" =~ ^($3)$ ]] || stop "--$1 can't be '$2'"; }

# What is at work is a process group of its own, so that all of it ends with this script.
work() { set -m; "$@" < /dev/null & set +m; wait $!; }
leave() {
    trap - HUP INT TERM
    group=$(jobs -p)
    for ((i = 0; i < 50; i++)); do kill -TERM -- "-${group:-none}" 2> /dev/null || break; sleep 0.1; done
    echo "reproduce.sh: stopped; each run loses up to an epoch or a minute; the same command goes on" >&2 || :
    exit "$1"
}
trap 'leave 129' HUP; trap 'leave 130' INT; trap 'leave 143' TERM

# nproc knows no quota of a container, and would take OpenMP's number of threads for the number of cores.
cores() {
    local n="${SLURM_CPUS_PER_TASK:-$(env -u OMP_NUM_THREADS nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)}"
    { cat "${CGROUP:-/sys/fs/cgroup}/cpu.max" 2> /dev/null || echo max; } | awk -v n="$n" '
        $1 + 0 > 0 && $1 < n * $2 { n = int(($1 + $2 - 1) / $2) } END { print n }'
}

CDPATH="" cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
[ -e ctl.py ] || { cd "${SLURM_SUBMIT_DIR:-.}" && [ -e ctl.py ]; } || stop "no ctl.py beside it" # Slurm runs a copy
ready() { cmp -s requirements.txt .venv/installed.txt && .venv/bin/python -c "" 2> /dev/null; }
# A .venv that is there is never cleared: the user may have made it, and other machines may use it.
set_up() (
    flock 9 2> /dev/null || : # tasks that start together set up one after the other, where locks are to be had
    if ready; then return; fi
    if [ ! -e .venv ] && [ ! -L .venv ]; then
        "${PYTHON:=python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null ||
            stop "PYTHON: $PYTHON does not run, or is older than 3.10"
        "$PYTHON" -m venv .venv
    fi
    .venv/bin/python -c "" 2> /dev/null || stop ".venv/bin/python does not run here: mend it, or move .venv away"
    .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null 2>&1 ||
        stop ".venv has no pip: install pip there, or move .venv away"
    echo "installing requirements.txt into .venv"
    .venv/bin/python -c "import torch" 2> /dev/null ||
        echo "On Linux this takes PyTorch with CUDA: several GB to download, 5.7 GB in .venv. For the CPU build" \
            "press Ctrl-C, install it into .venv (see pytorch.org/get-started), and give the same command again."
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
) 9> .venv.lock

# The cells of this task, a line each. On a CPU two runs of one thread do more than one run of two threads.
cells() {
    for ((seed = 0; seed < seeds; seed++)); do for name in "${datasets[@]}"; do for loss in $losses; do
        if [[ "$loss" =~ ^(contrastive|hard)$ ]]; then set -- $taus; else set -- ""; fi
        for tau; do printf -- '--loss %s%s --seed %s --dataset %q\n' "$loss" "${tau:+ --tau $tau}" "$seed" "$name"; done
    done; done; done | awk -v shares="$shares" -v share="$share" -v gpus="$gpus" 'NR % shares == share {
        print $0 (gpus > 0 ? " --device cuda:" n++ % gpus : " --device cpu --threads 1") }'
}

run_cell() {
    local cell="${1% --device *}" command="$1" name log before words status=0
    if [ "$gpus" -gt 0 ]; then command="${1%:*}:$((slot % gpus))"; fi # the GPU that is free now
    log="$logs/$(printf %s "${cell//--/}${more//--/}" | tr -cs 'a-zA-Z0-9.-' _ | cut -c 1-200).log"
    name="$(sed 's/--loss //; s/ --tau//; s/ --seed/, seed/; s/ --dataset/,/' <<< "$cell")"
    if [ -z "$several" ]; then name="${name%, *}"; fi
    printf 'start %s: tail -f %q\n' "$name" "$log"
    before=$(cat "$log" 2> /dev/null | wc -c)
    eval ".venv/bin/python ctl.py $common $command$more" >> "$log" 2>&1 || status=$?
    words="FAILED $name (status $status), the end of $log:"
    case "$status" in 0) words="done $name ($(((SECONDS + 30) / 60)) min)" ;; 3) words="busy $name" ;; esac
    if tail -c "+$((before + 1))" "$log" | grep "is there already" > /dev/null; then words="reused $name"; fi
    echo "$words" >> "$ended"
    words="[$(grep -nxF -- "$words" "$ended" | tail -n 1 | cut -d : -f 1)/$count] $words"
    [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || { printf '%s\n' "$words" "$(tail -n 5 "$log")" >&2; return 1; }
    echo "$words"
}
run_cells() { cells | tr '\n' '\0' | xargs -0 -n 1 -P "$jobs" $slots bash -c 'set -uo pipefail; run_cell "$1"' cell; }

preset="" datasets="" losses="contrastive hard simple hard-simple" taus="0.07 0.3 0.7 1.0" data=data out=runs
seeds="${SEEDS:-}" jobs="${JOBS:-}" dry="" more=""
while [ $# -gt 0 ]; do
    case "$1" in
        test) ready || work set_up; exec .venv/bin/python -m pytest -q -n "$(cores)" "${@:2}" test_ctl.py results ;;
        quick) preset=quick losses="contrastive hard simple" taus="0.3 0.7 1.0"; shift; continue ;;
        --dry-run) dry=yes; shift; continue ;;
        -h | --help) sed -n '2,/^if/s/^# \{0,1\}//p' reproduce.sh; exit 0 ;;
        --) [ $# -eq 1 ] || more="$(printf ' %q' "${@:2}")"; break ;;
        --preset | --datasets | --losses | --taus | --seeds | --jobs | --data | --out) ;;
        *) stop "unknown: $1" ;;
    esac
    [ $# -ge 2 ] && [ -n "${2// /}" ] || stop "$1 wants a value"
    printf -v "${1#--}" %s "$2"
    shift 2
done
case "$preset" in quick | smoke) : "${datasets:=waves}" ;; esac
datasets="${datasets/#~\//${HOME:-~}/}" seeds="${seeds:-$([ "$preset" = quick ] && echo 1 || echo 3)}"
if [ -d "$datasets" ]; then datasets=("$datasets"); else datasets=($datasets); fi
check preset "$preset" "|paper|narrow|mini|quick|smoke"
for name in seeds ${jobs:+jobs}; do check "$name" "${!name}" "[1-9][0-9]{0,5}"; done
for name in $losses; do check losses "$name" "contrastive|hard|simple|hard-simple|triplet"; done
for name in $taus; do check taus "$name" "[0-9.e-]+"; done
for name in "${datasets[@]:-waves}"; do [ -d "$name" ] || check datasets "$name" "cifar10|cifar100|svhn|waves"; done
# Slurm tells a task the first index, the last and how many there are, but not which: there must be no gap.
shares="${SLURM_ARRAY_TASK_COUNT:-1}" first="${SLURM_ARRAY_TASK_MIN:-0}" share=$((${SLURM_ARRAY_TASK_ID:-0} - first))
((shares == ${SLURM_ARRAY_TASK_MAX:-0} - first + 1)) || stop "array with gaps: write a range, such as --array=0-7"

[ -n "$dry" ] || ready || work set_up
gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.is_available() * torch.cuda.device_count())' 2> /dev/null ||
    nvidia-smi -L 2> /dev/null | grep -c "^GPU" || :) # a plan before PyTorch is there
slots=$([ "$gpus" -eq 0 ] || echo --process-slot-var=slot) # xargs of macOS has no slots
if [ "$gpus" -gt 0 ]; then : "${preset:=paper}" "${jobs:=$gpus}"; else : "${preset:=mini}" "${jobs:=$(cores)}"; fi
if [ "$preset" = mini ]; then echo "preset mini: 5,000 images and 60 epochs, not the paper's protocol"; fi
have='import sys, ctl; sys.exit(ctl.exit_status("left out", ctl.load_dataset, *sys.argv[1:]))'
[ ${#datasets[@]} -gt 0 ] || for name in cifar10 cifar100 svhn; do # -c must find ctl, whatever PYTHONSAFEPATH says
    [ -n "$dry" ] || work env -u PYTHONSAFEPATH .venv/bin/python -c "$have" "$name" "$data" || continue
    datasets+=("$name")
done
[ ${#datasets[@]} -gt 0 ] || stop "no data set can be had: take --datasets FOLDER or --datasets waves"
common=$(printf -- '--preset %s --data %q --out %q' "$preset" "$data" "$out") count=$(($(cells | wc -l)))
case "$preset" in paper) one=$((gpus ? 4 : 5400)) ;; narrow) one=120 ;; mini) one=15 ;; quick) one=2 ;; *) one=1 ;; esac
minutes=$(((count + jobs - 1) / jobs * one)) logs="$out/logs/$preset"
estimate=$([ "$preset" != paper ] && [ "$gpus" -eq 0 ] || echo " (an estimate)")
echo "plan: $count cells of preset $preset on$(printf ' %q' "${datasets[@]}"), $seeds seed(s), $jobs at once," \
    "$gpus GPU(s); about $((minutes / 60)) h $((minutes % 60)) min$estimate, less what is done already; logs in $logs"
[ -z "$dry" ] || cells | while IFS= read -r cell; do echo ".venv/bin/python ctl.py $common $cell$more"; done
[ -z "$dry" ] && [ "$count" -gt 0 ] || exit 0 # an array may have more tasks than there are cells
{ mkdir -p "$logs" && ended=$(mktemp "$logs/.ended.XXXXXX"); } 2> /dev/null || stop "--out: can't write into $logs"
trap 'rm -f "$ended"' EXIT
# glibc keeps freed memory: with 50,000 images on a CPU a step takes less time (results/SPEED.md).
export MALLOC_TOP_PAD_=134217728 MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
export -f run_cell && export common more logs ended count gpus several="${datasets[1]:-}"
work run_cells || failed=1
busy=$(grep -c "^busy" "$ended" || :)
[ "$busy" -eq "$count" ] || work .venv/bin/python results/report.py --out "$out" --preset "$preset" || failed=1
[ "$busy" -eq 0 ] || echo "reproduce.sh: another process runs $busy of $count cells: call again when it has ended" >&2
exit "${failed:-$((busy ? 3 : 0))}"
