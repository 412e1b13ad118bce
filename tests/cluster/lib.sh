# Shared by up.sh, node.sh and down.sh: where things are, and who is alive.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DIR=${MEALV2_CLUSTER_DIR:-/var/tmp/mealv2-cluster}
export MEALV2_CLUSTER_DIR=$DIR SLURM_CONF=$DIR/slurm.conf
MODE=$(cat "$DIR/mode" 2>/dev/null || echo none)

NET=10.88.7           # of mode net; the controller is .254, node i is .i
HEAD_NET=mealv2-head  # network namespace of the controller and of the bridge
TAG='# mealv2 test cluster'

address() { if [ "$MODE" = net ]; then echo "$NET.$1"; else echo 127.0.0.1; fi; }
node_port() { if [ "$MODE" = net ]; then echo 6818; else echo $((26830 + $1)); fi; }
node_net() { echo "mealv2-$1"; }

# a process that nobody has reaped yet still answers to kill -0: look at its state
alive() {
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] || return 1
  grep -q '^State:[[:space:]]*[^XZ[:space:]]' "/proc/$pid/status" 2>/dev/null
}

# until SECONDS COMMAND...: poll until it succeeds; 1 when time runs out
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.05
  done
}

on_head() { if [ "$MODE" = net ]; then nsenter --net=/run/netns/$HEAD_NET "$@"; else "$@"; fi; }
say() { echo "cluster: $*" >&2; }
