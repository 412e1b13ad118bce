#!/usr/bin/env bash
# node.sh on N...    switch virtual nodes on
# node.sh off N...   power cut: everything on them is gone, and nobody was told
# node.sh cut N...   pull the network cable (mode net); what runs there runs on. node.sh mend N...: plug it in again
# node.sh lost N...  wait until the controller has given them up. Between off and on: a node that is back sooner is not
#                    missed, and its steps, which are gone, are waited for
# node.sh wait N...  wait until the controller can use them; takes back those that were drained
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$DIR/env.sh"

pid_file() { echo "$DIR/run/node.$1.pid"; }
cable() { ip -n $HEAD_NET link set "$1" "$2"; }

plug_in() {  # a network namespace of the node's own, with a cable to the bridge
  local net
  net=$(node_net "$1")
  [ ! -e "/run/netns/$net" ] || return 0
  ip netns add "$net"
  ip -n "$net" link set lo up
  ip -n $HEAD_NET link add "$1" type veth peer name eth0 netns "$net"
  ip -n $HEAD_NET link set "$1" master bridge0 up
  ip -n "$net" address add "$NET.${1#n}/24" dev eth0
  ip -n "$net" link set eth0 up
}

# the first process of a node: names, then slurmd; as a shell it reaps what is orphaned there
BOOT='hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
slurmd -D -N "$1" & wait $!'

switch_on() {
  ! alive "$(pid_file "$1")" || return 0
  mkdir -p "$DIR/spool/$1"
  local start=(unshare --pid --uts --mount --fork --kill-child --mount-proc bash -c "$BOOT" boot "$1" "$DIR")
  case $MODE in
    net) plug_in "$1"; start=(nsenter "--net=/run/netns/$(node_net "$1")" "${start[@]}") ;;
    plain) start=(slurmd -D -N "$1") ;;
  esac
  setsid "${start[@]}" </dev/null >>"$DIR/log/node.$1.out" 2>&1 &
  echo $! >"$(pid_file "$1")"
}

end_jobs() {  # mode plain has no namespace that ends with its node: jobs are known by their environment
  local process
  for process in /proc/[0-9]*; do
    if grep -qzx "SLURMD_NODENAME=$1" "$process/environ" 2>/dev/null; then
      kill -KILL "${process##*/}" 2>/dev/null || true
    fi
  done
}

switch_off() {
  alive "$(pid_file "$1")" || return 0
  kill -KILL "$(cat "$(pid_file "$1")")"
  [ "$MODE" != plain ] || end_jobs "$1"
  is_off() { ! alive "$(pid_file "$1")"; }
  until_true 10 is_off "$1"
}

field() { scontrol -o show node "$1" | grep -oP "(?<=\b$2=)\S+"; }

is_usable() {
  local began
  case $(field "$1" State) in
    DOWN*|*DRAIN*) scontrol update "nodename=$1" state=resume 2>/dev/null; return 1 ;;
    *NOT_RESPONDING*|UNKNOWN*) return 1 ;;
    IDLE*|MIXED*|ALLOCATED*) ;;
    *) return 1 ;;
  esac
  began=$(date -d "$(field "$1" SlurmdStartTime)" +%s 2>/dev/null) || return 1
  [ "$began" -ge "$(stat -c %Y "$(pid_file "$1")")" ]  # the slurmd started last, not one before it
}

is_lost() { [[ $(field "$1" State) == DOWN* ]]; }

what=${1:-}
shift || true
case $what in
  on) for node in "$@"; do switch_on "$node"; done ;;
  off) for node in "$@"; do switch_off "$node"; done ;;
  cut) for node in "$@"; do cable "$node" down; done ;;
  mend) for node in "$@"; do cable "$node" up; done ;;
  lost) for node in "$@"; do until_true 60 is_lost "$node"; done ;;
  wait) for node in "$@"; do until_true 60 is_usable "$node"; done ;;
  *) sed -n '2,8s/^# //p' "$0" >&2; exit 2 ;;
esac
