"""Settings of the `mealv2 slurm` commands."""

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from pipeline.config.base import Settings
from pipeline.config.distill import DistillConfig
from pipeline.config.fields import (
    REQUIRED,
    argument,
    current_name,
    flag,
    frozen,
    in_batch_job,
    require,
    without_effect,
)

MAX_RESTARTS = 3  # of the processes on one node, by torchrun itself
SHARED = ("output", "labels", "data_dir", "resume", "auto_resume")  # by all students of a sweep
SWITCHES = {f.name for f in dataclasses.fields(DistillConfig) if f.type in (bool, bool | None)}


@dataclass(frozen=True)
class StageCommand:
    """A checked command line of precompute or distill: its words by setting, and its config."""

    stage: str
    options: dict[str, tuple[str, ...]]
    config: Settings

    @property
    def words(self) -> list[str]:
        """All words after the command, with absolute paths."""
        return [word for words in self.options.values() for word in words]


@dataclass(frozen=True)
class Choice:
    """One value of a setting that a sweep varies."""

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
        """The value in the name of the student's folder."""
        return re.sub(r"[^A-Za-z0-9._=+-]", "-", f"{flag(self.field)[2:]}={self.value}")


@frozen
class SlurmJob(Settings):
    """Settings of every batch job. Without a setting, the site's default applies."""

    stage: ClassVar[str]  # the command whose flags this one takes

    flags: tuple[str, ...] = argument(
        "Flags of `mealv2 precompute` or `mealv2 distill`; checked before anything is submitted."
    )
    time: str | None = in_batch_job(
        None, "Time limit of a job: minutes, H:MM:SS or D-HH.", shown="the partition's"
    )
    partition: str | None = in_batch_job(None, "Partition to run in.", shown="the site's")
    account: str | None = in_batch_job(None, "Account to charge.", shown="the user's")
    qos: str | None = in_batch_job(None, "Quality of service.", shown="the user's")
    constraint: str | None = in_batch_job(None, "Features that nodes must have.", shown="none")
    cpus_per_task: int | None = in_batch_job(None, "CPUs per node.", shown="Slurm's", low=1)
    gpus: int = in_batch_job(0, "GPUs per node.", low=0)
    mem: str | None = in_batch_job(None, "Memory per node, e.g. 64G.", shown="the site's")
    after: tuple[str, ...] = in_batch_job(
        (), "Start only after this job succeeds; repeat it for several.", shown="at once"
    )
    sbatch_arg: tuple[str, ...] = in_batch_job(
        (), "Another option of sbatch, e.g. --exclusive; repeat it for several.", shown="none"
    )
    setup: tuple[str, ...] = in_batch_job(
        (), "Shell line to run first, e.g. module load cuda; repeat it for several.", shown="none"
    )
    print_: bool = in_batch_job(False, "Print the scripts; write and submit nothing.")

    @property
    def first_flags(self) -> tuple[str, ...]:
        """The flags of the first command that the job runs."""
        return self.flags

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time", "partition", "account", "qos", "constraint", "mem"):
            value = getattr(self, name)
            is_word = value is None or re.fullmatch(r"[!-~]+", value)
            require(is_word, f"{flag(name)} cannot be {value!r}")
        is_time = self.time is None or re.fullmatch(r"[0-9]+([-:][0-9]+)*", self.time)
        require(is_time, f"--time must be minutes, H:MM:SS or D-HH, got {self.time!r}")
        for job in self.after:
            is_job = re.fullmatch(r"[0-9]+(_[0-9]+)?", job)
            require(is_job, f"--after must be the number of a job, got {job!r}")
        for word in self.sbatch_arg:
            is_option = re.match("--?[a-zA-Z]", word) and word.isprintable()
            require(is_option, f"--sbatch-arg must be an option of sbatch, got {word!r}")


@frozen
class SlurmPrecomputeConfig(SlurmJob):
    """Label the missing shards of a label set in a job array, then write its manifest.

    The tasks of the array share the missing shards. After lost tasks or nodes, run the same command
    again: it labels what is still missing.
    """

    example = (
        "mealv2 slurm precompute --array 64 --gpus 1 --time 4:00:00 --data-dir imagenet "
        "--teacher senet154.gluon_in1k --num-views 30 --output labels"
    )
    stage = "precompute"

    array: int = in_batch_job(8, "Maximum number of tasks of the array.", low=1)


@frozen
class SlurmTraining(SlurmJob):
    """Settings of batch jobs that train."""

    stage = "distill"

    nodes: int = in_batch_job(1, "Nodes per job.", low=1)
    nproc_per_node: int | None = in_batch_job(
        None, "Processes per node, started by torchrun.", shown="--gpus, else 1", low=1
    )
    max_requeues: int = in_batch_job(5, "Maximum restarts of a job of several processes.", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes * self.procs == 1:
            without_effect(self, "with one process, which Slurm requeues", "max_requeues")

    @property
    def procs(self) -> int:
        """Number of processes on each node."""
        return self.nproc_per_node or max(1, self.gpus)


@frozen
class SlurmDistillConfig(SlurmTraining):
    """Train a student in a batch job, on one node or several.

    A job that was preempted, or lost a node or a process, continues from its checkpoint; a
    cancelled job does not. After a time limit, run the same command again to continue.
    """

    example = (
        "mealv2 slurm distill --nodes 2 --gpus 4 --after 4711 --data-dir imagenet "
        "--labels labels --model resnet50.ram_in1k --output runs/student"
    )


@frozen
class SlurmSweepConfig(SlurmTraining):
    """Train one student per combination of settings from one label set, in a job array.

    The folder of a student is named after its settings: OUTPUT/seed=0, OUTPUT/seed=1, … Run the
    same command again to train the students that are not finished.
    """

    example = (
        "mealv2 slurm sweep --vary seed=0,1,2 --vary lr=0.01,0.02 --gpus 1 --data-dir imagenet "
        "--labels labels --model resnet50.ram_in1k --output runs/sweep"
    )

    vary: tuple[str, ...] = in_batch_job(
        REQUIRED,
        "FLAG=V1,V2,…: one student per value of a flag of distill; with several --vary, one per "
        "combination.",
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
    is_list = equals and values and re.fullmatch("[a-z0-9-]+", name)
    require(is_list, f"--vary must be FLAG=V1,V2,…, got {text!r}")
    field = _field(name)
    require(field not in SHARED, f"--vary {name}: all students of a sweep share it")
    given = {_field(word.partition("=")[0]) for word in flags if word.startswith("--")}
    require(field not in given, f"--{name} is given and also varied; leave one out")
    found = [Choice(field, value) for value in values.split(",")]
    for choice in found:
        is_valid = field not in SWITCHES or choice.value in ("yes", "no")
        require(is_valid, f"--vary {name} must be yes or no, got {choice.value!r}")
    return found


def _field(name: str) -> str:
    """Return the field of distill's config that a flag sets."""
    return current_name(DistillConfig, name.removeprefix("--").replace("-", "_"))
