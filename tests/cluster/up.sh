#!/usr/bin/env bash
# A real Slurm with virtual nodes on this one machine, for tests. Needs root; no systemd, no cgroups, no container.
# Run it again: what runs is left alone, what is missing is started. Ended by down.sh; nodes are switched by node.sh.
#
#   MEALV2_CLUSTER_DIR      its folder                                        (/var/tmp/mealv2-cluster)
#   MEALV2_CLUSTER_NODES    virtual nodes n1, n2, ...; 99 at most             (3)
#   MEALV2_CLUSTER_CPUS     CPUs that each claims, whatever the machine has   (2)
#   MEALV2_CLUSTER_MODE     net: each node has network, processes and host name of its own; nothing
#                                listens outside the namespaces, and a cable can be pulled
#                           pid: the same without a network, all on 127.0.0.1
#                           plain: several slurmd side by side on 127.0.0.1
#                           auto: the first of these that the machine allows  (auto)
#   MEALV2_CLUSTER_INSTALL  1: install missing Debian packages                (1)
#
# Then `. $MEALV2_CLUSTER_DIR/env.sh` gives sbatch, squeue and so on. Exit 77: this machine cannot (the last line says why).
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NODES=${MEALV2_CLUSTER_NODES:-3}
CPUS=${MEALV2_CLUSTER_CPUS:-2}
PACKAGES='slurmctld slurmd slurm-client munge iproute2 util-linux procps'

cannot() { say "$*"; exit 77; }
trap 'say "failed in line $LINENO; logs are in $DIR/log"; tail -n 3 "$DIR"/log/slurmctld.log >&2 2>/dev/null || true' ERR

# --- packages ---------------------------------------------------------------------------------

installed() {
  local command
  for command in munged slurmctld slurmd sbatch ip unshare nsenter pgrep; do
    command -v $command >/dev/null || return 1
  done
}

# the packages' scripts would start daemons for the whole machine: /usr/sbin/policy-rc.d forbids it
install() {
  local forbids=/usr/sbin/policy-rc.d ours='' log=$1
  if [ ! -e $forbids ]; then
    printf '#!/bin/sh\nexit 101\n' >$forbids
    chmod 755 $forbids
    ours=1
  fi
  local result=0
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $PACKAGES; } \
    >"$log" 2>&1 </dev/null || result=$?
  [ -z "$ours" ] || rm -f $forbids
  return $result
}

[ "$(uname -s)" = Linux ] || cannot "a virtual Slurm needs Linux"
[ "$(id -u)" = 0 ] || cannot "a virtual Slurm needs root"
if ! installed; then
  [ "${MEALV2_CLUSTER_INSTALL:-1}" = 1 ] || cannot "Slurm is not installed ($PACKAGES)"
  command -v apt-get >/dev/null || cannot "Slurm is not installed, and there is no apt-get"
  log=$(mktemp)
  install "$log" || { tail -n 5 "$log" >&2; cannot "apt-get could not install $PACKAGES"; }
  rm -f "$log"
fi

# --- what the machine allows --------------------------------------------------------------------

wanted=${MEALV2_CLUSTER_MODE:-auto}
if [ "$wanted" = auto ]; then
  private='unshare --pid --uts --mount --fork --mount-proc'
  if $private --net ip link add name probe0 type veth peer name probe1 2>/dev/null; then wanted=net
  elif $private true 2>/dev/null; then wanted=pid
  else wanted=plain; fi
fi
[ "$MODE" = none ] || [ "$MODE" = "$wanted" ] || "$HERE/down.sh"
MODE=$wanted

# --- configuration --------------------------------------------------------------------------------

mkdir -p "$DIR"/{bin,log,run,spool,state}
chmod 755 "$DIR"
[ -s "$DIR/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$DIR/munge.key")
release=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)

configuration() {
  local i host
  cat <<END
# mode $MODE
ClusterName=mealv2
SlurmctldHost=$(hostname -s)($(address 254))
SlurmctldPort=26829
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# 120 s, the default, is how long a requeued job waits
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
StateSaveLocation=$DIR/state
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool/%n
# nodes may claim more CPUs than there are; no cgroups
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MessageTimeout=5
# ended jobs are remembered for an hour: there is no accounting
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END
  case $release in
    22.*|23.*) echo SlurmctldParameters=preempt_send_user_signal ;;
    *) echo PreemptParameters=send_user_signal ;;
  esac
  [ "$MODE" = net ] || echo CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
  for i in $(seq "$NODES"); do
    host=n$i
    [ "$MODE" != plain ] || host=$(hostname -s)
    echo "NodeName=n$i NodeHostname=$host NodeAddr=$(address "$i") Port=$(node_port "$i") CPUs=$CPUS RealMemory=1000 Gres=gpu:2"
  done
  echo "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=INFINITE"
  echo "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE"
}

configuration >"$DIR/slurm.conf.new"
if [ -e "$DIR/slurm.conf" ] && ! cmp -s "$DIR/slurm.conf.new" "$DIR/slurm.conf"; then
  "$HERE/down.sh" --keep  # another shape than the one that runs
  rm -rf "${DIR:?}"/state/* "${DIR:?}"/spool/*
fi
mv "$DIR/slurm.conf.new" "$DIR/slurm.conf"
for gpu in 0 1; do  # copies of /dev/null, for jobs that ask for GPUs
  [ -e "$DIR/run/gpu$gpu" ] || mknod "$DIR/run/gpu$gpu" c 1 3
done
echo "Name=gpu File=$DIR/run/gpu[0-1]" >"$DIR/gres.conf"
case $release in
  22.*) rm -f "$DIR/cgroup.conf" ;;
  23.*) echo IgnoreSystemd=yes >"$DIR/cgroup.conf" ;;
  *) echo CgroupPlugin=disabled >"$DIR/cgroup.conf" ;;
esac
echo $MODE >"$DIR/mode"

# --- names and network ----------------------------------------------------------------------------

# nodes know each other by name; without a name server every reverse look-up would wait for one
{ echo "127.0.0.1 localhost"; for i in $(seq "$NODES"); do echo "$(address "$i") n$i"; done; } >"$DIR/hosts"
echo "hosts: files" >"$DIR/nsswitch.conf"
if [ "$MODE" = plain ]; then
  for i in $(seq "$NODES"); do
    grep -qF "n$i $TAG" /etc/hosts || echo "127.0.0.1 n$i $TAG" >>/etc/hosts
  done
fi
if [ "$MODE" = net ] && [ ! -e /run/netns/$HEAD_NET ]; then
  ip netns add $HEAD_NET
  ip -n $HEAD_NET link set lo up
  ip -n $HEAD_NET link add bridge0 type bridge
  ip -n $HEAD_NET address add $NET.254/24 dev bridge0
  ip -n $HEAD_NET link set bridge0 up
fi

# the client commands, from the machine as from a node
for command in sbatch srun scancel squeue sinfo scontrol; do
  enter=''
  [ "$MODE" != net ] || enter="nsenter --net=/run/netns/$HEAD_NET "
  cat >"$DIR/bin/$command" <<END
#!/bin/sh
[ -z "\$SLURMD_NODENAME" ] || exec /usr/bin/$command "\$@"
exec ${enter}/usr/bin/$command "\$@"
END
  chmod 755 "$DIR/bin/$command"
done
echo "export SLURM_CONF=$DIR/slurm.conf PATH=$DIR/bin:\$PATH" >"$DIR/env.sh"

# --- daemons ----------------------------------------------------------------------------------------

munge_answers() { munge -n -S "$DIR/run/munge.sock" >/dev/null 2>&1; }
if ! munge_answers; then
  rm -f "$DIR"/run/munge.sock*
  munged --key-file="$DIR/munge.key" --socket="$DIR/run/munge.sock" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" </dev/null
  until_true 10 munge_answers
fi
alive "$DIR/run/slurmctld.pid" || on_head slurmctld </dev/null >>"$DIR/log/slurmctld.out" 2>&1
names=$(seq -f 'n%g' "$NODES")
"$HERE/node.sh" on $names
"$HERE/node.sh" wait $names || { say "nodes did not come up; logs are in $DIR/log"; exit 1; }
say "ready: mode $MODE, $NODES nodes of $CPUS CPUs;  . $DIR/env.sh"
