#!/usr/bin/env bash
# Ends what up.sh started, by process number, and removes its folder; --keep leaves the folder.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

end_daemon() {
  local pid
  alive "$DIR/run/$1.pid" || return 0
  pid=$(cat "$DIR/run/$1.pid")
  kill -TERM "$pid"
  is_gone() { ! alive "$DIR/run/$1.pid"; }
  until_true 10 is_gone "$1" || kill -KILL "$pid"
}

if [ "$MODE" != none ]; then
  for file in "$DIR"/run/node.*.pid; do
    [ -e "$file" ] || continue
    node=${file##*/node.}
    "$HERE/node.sh" off "${node%.pid}"
    rm -f "$file"
  done
  end_daemon slurmctld
  end_daemon munged
fi
for net in /run/netns/mealv2-*; do
  [ ! -e "$net" ] || ip netns delete "${net##*/}"
done
if grep -qF "$TAG" /etc/hosts; then
  rest=$(grep -vF "$TAG" /etc/hosts)  # written in place: in a container it is a mount
  printf '%s\n' "$rest" >/etc/hosts
fi
[ "${1:-}" = --keep ] || rm -rf "$DIR"
