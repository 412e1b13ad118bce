#!/usr/bin/env bash
# @NAME@: @TITLE@.
# From a folder of ImageNet to the published number: @PUBLISHED@
# (@SOURCE@).
#
#   mealv2 recipes show @NAME@ --script > @NAME@.sh
#   DATA=/data/imagenet bash @NAME@.sh
#
# It may be interrupted anywhere: by Ctrl-C, SIGTERM or a power cut. The same command skips what is
# done and continues the rest. Exit codes are mealv2's: 2 for wrong settings, 4 after a signal.
# docs/how-to/reproduce.md has hours, disk space, and how to read what is printed.
set -euo pipefail

# --- settings; variables of the environment replace them ------------------------------------------
# OUT/settings keeps them: what is done there counts only for the same ones.
DATA=${DATA:-imagenet}              # DATA/train/WNID/*.JPEG and DATA/val/WNID/*.JPEG, or tar shards
OUT=${OUT:-reproduce/@NAME@}
# online: the teachers label every crop, as published. stored: they label NUM_VIEWS crops an image
# once, for all recipes with these teachers, which costs less and is another training.
MODE=${MODE:-online}
LABELS=${LABELS:-reproduce/labels-@SIZE@}    # of MODE=stored
NUM_VIEWS=${NUM_VIEWS:-@VIEWS@}
# The published runs had 8 GPUs: batch norm saw 64 images of the batch of 512 on each.
GPUS=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)}
WORKERS=${WORKERS:-8}               # threads that read images, for each GPU
RESULTS=${RESULTS:-reproduced.json} # the table of `mealv2 recipes record`, and reproduced.md beside it

STUDENT=${STUDENT:-@STUDENT@}
START=${START:-}                    # a checkpoint instead of timm's weights
TEACHERS=${TEACHERS:-@TEACHERS@}
IMG_SIZE=${IMG_SIZE:-@SIZE@}
IMAGES=${IMAGES:-1281167}           # what DATA must have
VAL_IMAGES=${VAL_IMAGES:-50000}
START_SIZE=${START_SIZE:-@START_SIZE@}       # pixels of the start's published accuracy
TOLERANCE=${TOLERANCE:-@TOLERANCE@}           # points of top-1 between published weights and their measurement
# More flags, separated by spaces, such as PRECOMPUTE_ARGS=--amp. A changed training is recorded
# only with RECORD_ARGS=--variant, which may be added later.
PRECOMPUTE_ARGS=${PRECOMPUTE_ARGS:-}
DISTILL_ARGS=${DISTILL_ARGS:-}
EVALUATE_ARGS=${EVALUATE_ARGS:-}
RECORD_ARGS=${RECORD_ARGS:-}

# --- functions ------------------------------------------------------------------------------------
exec 3>&2
info() { printf '%s\n' "== $*" >&3; }

fail() {
    info "$*"
    exit 1
}

usage() {
    info "$*"
    exit 2
}

# What the files in OUT are made with, a line for each setting.
settings() {
    local names=(MODE DATA STUDENT START TEACHERS IMG_SIZE START_SIZE) name
    [ "$MODE" = online ] || names+=(LABELS NUM_VIEWS)
    echo "recipe=@NAME@"
    for name in "${names[@]}" PRECOMPUTE_ARGS DISTILL_ARGS EVALUATE_ARGS; do
        printf '%s=%q\n' "$name" "${!name}"
    done
}

# keep_settings: write OUT/settings, or stop if it has others.
keep_settings() {
    local file=$OUT/settings before now
    if [ ! -s "$file" ]; then
        settings >"$file.part"
        mv "$file.part" "$file"
    fi
    before=$(settings | grep -vxFf - "$file" | paste -sd ' ' - || true)
    now=$(settings | grep -vxFf "$file" | paste -sd ' ' - || true)
    [ -z "$before$now" ] || usage "$OUT was made with $before; now it is $now: give another OUT," \
        "or remove $file if what is there still counts"
}

# run COMMAND...: a signal to this script stops COMMAND, which saves; then the script ends with 4.
child='' stopped=''
on_signal() {
    stopped=early
    if [ -n "$child" ]; then
        stopped=yes
        kill -TERM "$child" 2>/dev/null || true
    fi
}
trap on_signal INT TERM HUP

run() {
    local code=0
    [ -z "$stopped" ] || exit 4
    set -m # a process group of its own: Ctrl-C reaches it once, through on_signal
    "$@" &
    child=$!
    set +m
    [ "$stopped" != early ] || on_signal
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the command
        code=0
        wait "$child" || code=$?
    done
    child=''
    if [ -n "$stopped" ]; then
        info "stopped; the same command continues"
        exit 4
    fi
    return "$code"
}

# report NAME COMMAND...: run COMMAND once, and keep the JSON that it prints in OUT/NAME.json.
# With a file in `log`, its messages go there, and are shown only if it fails.
log=''
report() {
    local file=$OUT/$1.json code=0
    shift
    if [ -s "$file" ]; then
        info "done: $file"
        return
    fi
    if [ -z "$log" ]; then
        run "$@" >"$file.part"
    else
        run "$@" >"$file.part" 2>"$log" || code=$?
        if [ "$code" -ne 0 ]; then
            cat "$log" >&3
            exit "$code"
        fi
    fi
    mv "$file.part" "$file"
}

# check NAME KEY EXPECTED TOLERANCE: stop if a number of OUT/NAME.json is another one.
check() {
    local value
    value=$(LC_ALL=C sed -n "s/.*\"$2\": \\([0-9.]*\\).*/\\1/p" "$OUT/$1.json" | tail -n 1)
    [ -n "$value" ] || fail "$OUT/$1.json has no $2"
    if [ -z "$3" ]; then
        info "$1: $2 $value; no published number"
    elif LC_ALL=C awk "BEGIN { d = $value - $3; exit !(d <= $4 && -d <= $4) }"; then
        info "$1: $2 $value, expected $3 +- $4: good"
    else
        fail "$1: $2 is $value, expected $3 +- $4: other data or other weights? Remove $OUT/$1.json to measure again"
    fi
}

# Top-1 of published weights on ImageNet's validation images.
published_top1() {
    case $1 in
@ACCURACIES@
    esac
}

evaluate() { # NAME PIXELS MODEL [CHECKPOINT]
    local command=(mealv2 evaluate --data-dir "$DATA" --img-size "$2" --model "$3")
    [ -z "${4:-}" ] || command+=(--checkpoint "$4")
    # shellcheck disable=SC2086  # several flags
    report "$1" "${command[@]}" --workers "$WORKERS" --json $EVALUATE_ARGS
    check "$1" num_images "$VAL_IMAGES" 0
    check "$1" top1 "$([ -n "${4:-}" ] || published_top1 "$3")" "$TOLERANCE"
}

# --- 1. the data, and with MODE=stored how long stage one takes here ------------------------------
case $MODE in online | stored) ;; *) usage "MODE is online or stored, not $MODE" ;; esac
case $GPUS in '' | *[!0-9]* | ??????*) usage "GPUS is a number of processes, not '$GPUS'" ;; esac
[ "$GPUS" -ge 1 ] || GPUS=1
for name in OUT DATA LABELS START RESULTS; do # a name that begins with - is no flag
    [[ ${!name} != -* ]] || printf -v "$name" '%s' "./${!name}"
done
mkdir -p "$OUT"
keep_settings
info "@NAME@ on $GPUS GPU(s), MODE=$MODE, into $OUT"

precompute=(mealv2 precompute --recipe @NAME@ --data-dir "$DATA" --output "$LABELS")
precompute+=(--num-views "$NUM_VIEWS" --teacher "$TEACHERS" --img-size "$IMG_SIZE" --workers "$WORKERS")
[ "$MODE" = stored ] || log=$OUT/data.log # the estimate in it is that of stage one
# shellcheck disable=SC2086  # several flags
report data "${precompute[@]}" --dry-run $PRECOMPUTE_ARGS
log=''
check data images "$IMAGES" 0

# --- 2. the teachers and the student's start, each with its own input statistics ------------------
IFS=, read -r -a teachers <<<"$TEACHERS"
number=0
for teacher in "${teachers[@]}"; do
    number=$((number + 1))
    name=${teacher%%=*}
    checkpoint=${teacher#"$name"}
    evaluate "teacher-$number" "$IMG_SIZE" "$name" "${checkpoint#=}"
done
@START@
# --- 3. stage one, only with MODE=stored ----------------------------------------------------------
if [ "$MODE" = stored ]; then
    compared=first
    if mealv2 labels status "$LABELS" >/dev/null 2>&1; then
        compared=never # complete; training compares the images
    fi
    # shellcheck disable=SC2086  # several flags
    run "${precompute[@]}" --num-procs "$GPUS" --check-images "$compared" $PRECOMPUTE_ARGS
fi

# --- 4. training ----------------------------------------------------------------------------------
distill=(mealv2)
[ "$GPUS" -eq 1 ] || distill=(torchrun --standalone --nproc-per-node "$GPUS" -m mealv2)
distill+=(distill --recipe @NAME@ --data-dir "$DATA" --model "$STUDENT" --output "$OUT/run")
[ -z "$START" ] || distill+=(--initial-checkpoint "$START")
if [ "$MODE" = stored ]; then
    distill+=(--labels "$LABELS"@STORED@)
else
    distill+=(--online --teacher "$TEACHERS" --img-size "$IMG_SIZE")
fi
if [ -s "$OUT/run/report.json" ]; then
    info "done: $OUT/run/report.json"
else
    # shellcheck disable=SC2086  # several flags
    run "${distill[@]}" --workers "$WORKERS" --auto-resume --recovery-interval 500 $DISTILL_ARGS
fi

# --- 5. the number, and its row in the table ------------------------------------------------------
# shellcheck disable=SC2086  # several flags
report result mealv2 evaluate --data-dir "$DATA" --checkpoint "$OUT/run" --workers "$WORKERS" --json $EVALUATE_ARGS
check result num_images "$VAL_IMAGES" 0
# shellcheck disable=SC2086  # several flags
run mealv2 recipes record "$OUT/run" --output "$RESULTS" $RECORD_ARGS
info "published: @PUBLISHED@; ours is in $OUT/result.json and in $RESULTS"
