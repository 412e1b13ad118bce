"""Settings of the `mealv2 slurm` commands: what Slurm is asked for."""

import re
from dataclasses import dataclass
from typing import ClassVar

from mealv2.errors import ConfigError
from pipeline.config.base import Settings
from pipeline.config.fields import at_least, flag, positional, required, setting

MAX_RESTARTS = 3  # of the processes on one node, by torchrun itself


@dataclass(frozen=True)
class StageCommand:
    """A command line of a stage, checked: its options by setting, as words, and what they make."""

    stage: str
    options: dict[str, tuple[str, ...]]
    config: Settings

    @property
    def words(self) -> list[str]:
        """The options one after another, paths absolute."""
        return [word for words in self.options.values() for word in words]


@dataclass(frozen=True, kw_only=True)
class SlurmJob(Settings):
    """What every batch job can ask for; what is not given is the site's to decide."""

    stage: ClassVar[str]  # whose flags the command takes

    flags: tuple[str, ...] = positional(
        "The stage's own, as after `mealv2 precompute` or `mealv2 distill`; checked at once."
    )
    time: str | None = setting(
        None, "Time limit of a job: minutes, H:MM:SS or D-HH.", shown="the partition's"
    )
    partition: str | None = setting(None, "Partition to run in.", shown="the site's")
    account: str | None = setting(None, "Account to charge.", shown="the user's")
    qos: str | None = setting(None, "Quality of service.", shown="the user's")
    constraint: str | None = setting(None, "Features that nodes must have.", shown="none")
    cpus_per_task: int | None = setting(None, "CPUs of each node of a job.", shown="Slurm's")
    gpus: int = setting(0, "GPUs of each node of a job.")
    mem: str | None = setting(None, "Memory of each node of a job, as 64G.", shown="the site's")
    after: tuple[str, ...] = setting(
        (),
        "Start when this job has ended well, and never if it did not; repeat it for several.",
        shown="at once",
    )
    sbatch_arg: tuple[str, ...] = setting(
        (), "Any other option of sbatch, as --exclusive; repeat it for several.", shown="none"
    )
    setup: tuple[str, ...] = setting(
        (), "Shell line to run first, as module load cuda; repeat it for several.", shown="none"
    )
    print_: bool = setting(False, "Print the scripts; write and submit nothing.")

    def __post_init__(self) -> None:
        at_least(self, 0, "gpus")
        if self.cpus_per_task is not None:
            at_least(self, 1, "cpus_per_task")
        for name in ("time", "partition", "account", "qos", "constraint", "mem"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[!-~]+", value):
                raise ConfigError(f"{flag(name)} cannot be {value!r}")
        if self.time is not None and not re.fullmatch(r"[0-9]+([-:][0-9]+)*", self.time):
            raise ConfigError(f"--time is minutes, H:MM:SS or D-HH, got {self.time!r}")
        for job in self.after:
            if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
                raise ConfigError(f"--after {job!r} is no job: give its number")
        for word in self.sbatch_arg:
            if not (re.match("--?[a-zA-Z]", word) and word.isprintable()):
                raise ConfigError(f"--sbatch-arg {word!r} is no option of sbatch")


@dataclass(frozen=True, kw_only=True)
class SlurmPrecomputeConfig(SlurmJob):
    """Label what a set lacks by an array of jobs, then write its manifest.

    Each task labels its share of the shards that are missing now. Lost tasks, killed ones or whole
    nodes: the same command again labels what is missing then.
    """

    stage = "precompute"

    array: int = setting(8, "Tasks of the array, at most.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "array")


@dataclass(frozen=True, kw_only=True)
class SlurmTraining(SlurmJob):
    """What jobs that train ask for."""

    stage = "distill"

    nodes: int = setting(1, "Nodes of a job.")
    nproc_per_node: int | None = setting(
        None, "Processes on each node, started by torchrun.", shown="--gpus, else 1"
    )
    max_requeues: int = setting(5, "Times that a job of several processes begins again by itself.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "nodes")
        at_least(self, 0, "max_requeues")
        if self.nproc_per_node is not None:
            at_least(self, 1, "nproc_per_node")

    @property
    def procs(self) -> int:
        """Processes on each node."""
        return self.nproc_per_node or max(1, self.gpus)


@dataclass(frozen=True, kw_only=True)
class SlurmDistillConfig(SlurmTraining):
    """Train a student in a batch job, on one node or several.

    A job that was preempted, or lost a node or a process, goes on from its checkpoint; one that
    was cancelled stays so. The same command again continues what a time limit ended.
    """


@dataclass(frozen=True, kw_only=True)
class SlurmSweepConfig(SlurmTraining):
    """Train students of several settings from one label set, by an array with a task for each.

    A student's folder is named after what it varies: OUTPUT/seed=0, OUTPUT/seed=1, … The same
    command again trains those that have not come to their end.
    """

    vary: tuple[str, ...] = required(
        "FLAG=V1,V2,…: a student for each value of a flag of distill; of several, for each choice."
    )
