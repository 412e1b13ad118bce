"""Settings of the `mealv2 slurm` commands: what Slurm is asked for."""

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from mealv2.errors import ConfigError
from pipeline.config.base import Settings
from pipeline.config.distill import DistillConfig
from pipeline.config.fields import (
    at_least,
    current_name,
    flag,
    positional,
    required,
    setting,
    without_effect,
)

MAX_RESTARTS = 3  # of the processes on one node, by torchrun itself
SHARED = ("output", "labels", "data_dir", "resume", "auto_resume")  # by all students of a sweep
SWITCHES = {f.name for f in dataclasses.fields(DistillConfig) if f.type in (bool, bool | None)}


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


@dataclass(frozen=True)
class Choice:
    """A value of a setting that a sweep varies."""

    field: str
    value: str

    @property
    def words(self) -> list[str]:
        """The words that give the value to distill."""
        if self.field not in SWITCHES:
            return [flag(self.field), self.value]
        return [flag(self.field) if self.value == "yes" else f"--no-{flag(self.field)[2:]}"]

    @property
    def name(self) -> str:
        """The value as a part of the name of the student's folder."""
        return re.sub(r"[^A-Za-z0-9._=+-]", "-", f"{flag(self.field)[2:]}={self.value}")


@dataclass(frozen=True, kw_only=True)
class SlurmJob(Settings):
    """What every batch job can ask for; what is not given is the site's to decide."""

    stage: ClassVar[str]  # whose flags the command takes

    flags: tuple[str, ...] = positional(
        "Flags of `mealv2 precompute` or `mealv2 distill`; checked before anything is submitted."
    )
    time: str | None = setting(
        None,
        "Time limit of a job: minutes, H:MM:SS or D-HH.",
        group="Batch job",
        shown="the partition's",
    )
    partition: str | None = setting(
        None, "Partition to run in.", group="Batch job", shown="the site's"
    )
    account: str | None = setting(None, "Account to charge.", group="Batch job", shown="the user's")
    qos: str | None = setting(None, "Quality of service.", group="Batch job", shown="the user's")
    constraint: str | None = setting(
        None, "Features that nodes must have.", group="Batch job", shown="none"
    )
    cpus_per_task: int | None = setting(
        None, "CPUs per node of a job.", group="Batch job", shown="Slurm's"
    )
    gpus: int = setting(0, "GPUs per node of a job.", group="Batch job")
    mem: str | None = setting(
        None, "Memory per node of a job, such as 64G.", group="Batch job", shown="the site's"
    )
    after: tuple[str, ...] = setting(
        (),
        "Start only after this job succeeds; repeat it for several.",
        group="Batch job",
        shown="at once",
    )
    sbatch_arg: tuple[str, ...] = setting(
        (),
        "Any other option of sbatch, such as --exclusive; repeat it for several.",
        group="Batch job",
        shown="none",
    )
    setup: tuple[str, ...] = setting(
        (),
        "Shell line to run first, such as module load cuda; repeat it for several.",
        group="Batch job",
        shown="none",
    )
    print_: bool = setting(False, "Print the scripts; write and submit nothing.", group="Batch job")

    @property
    def first_flags(self) -> tuple[str, ...]:
        """The flags of the first command that the job runs."""
        return self.flags

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
    """Label the missing shards of a label set by an array of jobs, then write its manifest.

    Each task labels a part of the shards that are missing. After lost tasks or nodes, run the same
    command again: it labels what is still missing.
    """

    example = (
        "mealv2 slurm precompute --array 64 --gpus 1 --time 4:00:00 --data-dir imagenet "
        "--teacher senet154.gluon_in1k --num-views 30 --output labels"
    )

    stage = "precompute"

    array: int = setting(8, "Maximum number of tasks of the array.", group="Batch job")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "array")


@dataclass(frozen=True, kw_only=True)
class SlurmTraining(SlurmJob):
    """What jobs that train ask for."""

    stage = "distill"

    nodes: int = setting(1, "Nodes per job.", group="Batch job")
    nproc_per_node: int | None = setting(
        None,
        "Processes per node, started by torchrun.",
        group="Batch job",
        shown="--gpus, else 1",
    )
    max_requeues: int = setting(
        5, "How often a job of several processes restarts by itself.", group="Batch job"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "nodes")
        at_least(self, 0, "max_requeues")
        if self.nproc_per_node is not None:
            at_least(self, 1, "nproc_per_node")
        if self.nodes * self.procs == 1:
            without_effect(self, "with one process, which Slurm requeues", "max_requeues")

    @property
    def procs(self) -> int:
        """Processes on each node."""
        return self.nproc_per_node or max(1, self.gpus)


@dataclass(frozen=True, kw_only=True)
class SlurmDistillConfig(SlurmTraining):
    """Train a student in a batch job, on one node or several.

    A job that was preempted, or lost a node or a process, continues from its checkpoint; a
    cancelled one does not. After a time limit, run the same command again to continue.
    """

    example = (
        "mealv2 slurm distill --nodes 2 --gpus 4 --after 4711 --data-dir imagenet "
        "--labels labels --model resnet50.ram_in1k --output runs/student"
    )


@dataclass(frozen=True, kw_only=True)
class SlurmSweepConfig(SlurmTraining):
    """Train students of several settings from one label set, by an array with a task for each.

    A student's folder is named after its settings: OUTPUT/seed=0, OUTPUT/seed=1, … The same
    command again trains those that are not finished.
    """

    example = (
        "mealv2 slurm sweep --vary seed=0,1,2 --vary lr=0.01,0.02 --gpus 1 --data-dir imagenet "
        "--labels labels --model resnet50.ram_in1k --output runs/sweep"
    )

    vary: tuple[str, ...] = required(
        "FLAG=V1,V2,…: one student per value of a flag of distill; with several --vary, one per "
        "combination.",
        group="Batch job",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.choices

    @property
    def choices(self) -> list[list[Choice]]:
        """The values of each --vary; raises ConfigError."""
        return [_choices(text, self.flags) for text in self.vary]

    @property
    def first_flags(self) -> tuple[str, ...]:
        """The flags of the first student."""
        return (*self.flags, *(word for values in self.choices for word in values[0].words))


def _choices(text: str, flags: tuple[str, ...]) -> list[Choice]:
    """Return the values that a --vary gives to its flag."""
    name, equals, values = text.removeprefix("--").partition("=")
    if not (equals and values and re.fullmatch("[a-z0-9-]+", name)):
        raise ConfigError(f"--vary is FLAG=V1,V2,…, got {text!r}")
    field = _field(name)
    if field in SHARED:
        raise ConfigError(f"--vary {name}: all students of a sweep share it")
    given = [word.partition("=")[0] for word in flags if word.startswith("--")]
    if field in map(_field, given):
        raise ConfigError(f"--{name} is given, and varied")
    found = [Choice(field, value) for value in values.split(",")]
    for choice in found:
        if field in SWITCHES and choice.value not in ("yes", "no"):
            raise ConfigError(f"--vary {name} is yes or no, not {choice.value!r}")
    return found


def _field(name: str) -> str:
    """Return the field of distill's config that a flag sets."""
    return current_name(DistillConfig, name.removeprefix("--").replace("-", "_"))
