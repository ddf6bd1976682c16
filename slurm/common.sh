# shellcheck shell=bash
# shellcheck disable=SC2153,SC2154  # here and script are set by the scripts that source this file
# Shared by the scripts of this folder: options, submission, signals and retries. Sourced, never run.
#
# Exit codes of codecssl: 0 done, 1 an error of one line, 2 wrong usage, 70 a crash, 75 stopped by a signal with
# all work saved, 76 stuck. 1 and 2 are never requeued. Everything else is (also 137: SIGKILL, out of memory, and
# warnings, also those before the program handles signals), but at most CODECSSL_RETRIES times in a row without progress.

# shellcheck source-path=SCRIPTDIR source=site.sh
source "$here/site.sh"
export CODECSSL_SLURM=$here
read -ra python <<<"$CODECSSL_CONTAINER"
python+=("$CODECSSL_PYTHON")
read -ra more_options <<<"$CODECSSL_SBATCH"

in_job() { [ "${0##*/}" = slurm_script ]; }

say() { echo "codecssl: $*" >&2; }

die() {
    echo "error: $*" >&2
    exit "${2:-1}"
}

usage() { sed -n '/^#SBATCH/d; /^#!/d; /^[^#]/q; s/^# \{0,1\}//p' "$script"; }

# Sets own[...] to the options of the scripts of this folder, at any position, and rest to all others.
parse() {
    declare -gA own=([dry-run]="" [after]="" [done]="" [name]="" [finish]="")
    rest=()
    while [ $# -gt 0 ]; do
        case $1 in
            --dry-run | --finish) own[${1#--}]=yes ;;
            --help | -h) usage && exit 0 ;;
            --after | --done | --name | --tasks | --elements | --throttle | --nodes | --gpus | --parts)
                [ $# -ge 2 ] || die "$1: has no value" 2
                own[${1#--}]=$2 && shift
                ;;
            *) rest+=("$1") ;;
        esac
        shift
    done
}

# The value of option $1 (or its short form $2) among the other arguments. Fails if the option is missing.
value_of() {
    local long=$1 short=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
            "$long" | "$short") printf '%s\n' "${2-}" && return ;;
            "$long"=*) printf '%s\n' "${1#*=}" && return ;;
        esac
        shift
    done
    return 1
}

# ---------------------------------------------------------------- submitting

# submit OPTION... -- ARGUMENT...: this script as a job; its number on stdout. --dry-run prints the command instead.
submit() {
    local options=(--parsable --requeue --open-mode=append --kill-on-invalid-dep=yes
        "--signal=B:USR2@$CODECSSL_WARN_SECONDS" "--time=$CODECSSL_TIME")
    [ -z "$CODECSSL_ACCOUNT" ] || options+=("--account=$CODECSSL_ACCOUNT")
    [ -z "$CODECSSL_QOS" ] || options+=("--qos=$CODECSSL_QOS")
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    local command=(sbatch "${options[@]}" "${more_options[@]}" "$script" "$@")
    if [ -n "${own[dry-run]}" ]; then
        printf '%q ' "${command[@]}" >&2
        printf '\n' >&2
        echo "JOB-OF-$(value_of --job-name "" "${options[@]}")"
        return
    fi
    mkdir -p "$CODECSSL_LOGS"
    "${command[@]}" | cut -d ';' -f 1
}

# The options of a job with $1 GPUs: its partition, and the GPUs.
place() {
    local partition=$CODECSSL_CPU_PARTITION
    [ "$1" = 0 ] || { partition=$CODECSSL_GPU_PARTITION && echo "--gpus-per-node=$1"; }
    [ -z "$partition" ] || echo "--partition=$partition"
    echo "--cpus-per-task=$CODECSSL_CPUS"
}

# after JOB: wait until the jobs of --after succeed, and until the array JOB, if given, ends with any result.
after() {
    local rules=${own[after]:+afterok:${own[after]}}${1:+,afterany:$1}
    [ -z "$rules" ] || echo "--dependency=${rules#,}"
}

device() { [ "${SLURM_GPUS_ON_NODE:-0}" = 0 ] && echo cpu || echo cuda; }

# ---------------------------------------------------------------- signals and retries

# A measure of progress, compared between two crashes; a script may define its own.
progress() { echo -; }

# The signal that Slurm sent to this script, and the program to pass it on to.
warned="" child=""
heard() {
    warned=$1 interrupted=yes
    [ -z "$child" ] || kill "-$1" "$child" 2>/dev/null || true
}

# survive PROGRAM ARGUMENT...: run it, pass warnings on to it, and return when it is done; else end or requeue the job.
# It must be a program: a function would run in a shell of its own, which a warning would kill.
survive() {
    local status interrupted=yes
    [ "$warned" != TERM ] || exit 143
    [ -z "$warned" ] || requeue "warned before the next start"
    "$@" &
    child=$!
    while [ -n "$interrupted" ]; do # a signal to this script interrupts the wait, not the program
        interrupted="" status=0
        wait "$child" || status=$?
    done
    child=""
    case $status:$warned in
        0:*) ;;
        1:* | 2:*) exit "$status" ;;
        *:TERM) say "ended by Slurm or scancel" && exit "$status" ;; # Slurm requeues what it preempted itself
        75:* | *:USR2) retry "$status" " after ${warned:-a signal}, stop" ;;
        *) retry "$status" ", crash" ;;
    esac
}

# retry STATUS WHAT: requeue, unless the job was requeued CODECSSL_RETRIES times in a row without progress.
retry() {
    local file="$CODECSSL_LOGS/retries-$SLURM_JOB_ID" before="" count=0 now
    now=$(progress)
    [ ! -f "$file" ] || read -r before count <"$file"
    [ "$before" = "$now" ] || count=0
    mkdir -p "$CODECSSL_LOGS"
    echo "$now $((count + 1))" >"$file"
    if [ "$count" -ge "$CODECSSL_RETRIES" ]; then
        say "exit code $1$2 $((count + 1)) without progress; not tried again" && exit "$1"
    fi
    requeue "exit code $1$2 $((count + 1)) without progress"
}

requeue() {
    trap - USR2 TERM
    say "$1 on $(hostname -s) at $(date '+%F %T'); job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || die "job $SLURM_JOB_ID cannot be requeued; submit it again to continue" 75
    sleep 300 & # Slurm ends this script; it must not end earlier
    wait
}

finished() { [ -z "${own[done]}" ] || { mkdir -p "$(dirname "${own[done]}")" && touch "${own[done]}"; }; }

if in_job; then
    trap 'heard USR2' USR2
    trap 'heard TERM' TERM
    eval "$CODECSSL_SETUP"
fi
