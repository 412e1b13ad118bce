"""Every setting of every stage: frozen dataclasses, the only place with defaults and help texts.

The command line is built from these fields; a run folder keeps them as config.json. No torch here.
"""

from pipeline.config.base import (
    DEFAULT_EMA_DECAY,
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    DEFAULT_SHARD_SIZE,
    NO_SPLIT,
    PAPER_EPOCHS,
    PAPER_MILESTONE,
    Caching,
    CompileMode,
    Cutting,
    Jobs,
    Labelling,
    Machine,
    OnBadImage,
    Reading,
    Settings,
)
from pipeline.config.bench import BenchConfig
from pipeline.config.distill import DistillConfig
from pipeline.config.fields import flag, is_location, plain, spelling, split_teachers
from pipeline.config.label_sets import (
    LabelsAddViewsConfig,
    LabelsConvertConfig,
    LabelsExportConfig,
    LabelsFinishConfig,
    LabelsImportConfig,
    LabelsInfoConfig,
    LabelsMergeConfig,
    LabelsSplitConfig,
    LabelsStatusConfig,
    LabelsVerifyConfig,
    NewEncoding,
)
from pipeline.config.labels import PrecomputeConfig
from pipeline.config.pack import PackConfig
from pipeline.config.slurm import (
    MAX_RESTARTS,
    SlurmDistillConfig,
    SlurmJob,
    SlurmPrecomputeConfig,
    SlurmSweepConfig,
    SlurmTraining,
    StageCommand,
)
from pipeline.config.training import FinetuneConfig, TrainConfig
from pipeline.config.use import DemoConfig, EvaluateConfig, ExportConfig, PredictConfig, ReadyModel

__all__ = [
    "DEFAULT_EMA_DECAY",
    "DEFAULT_IMG_SIZE",
    "DEFAULT_RATE",
    "DEFAULT_SHARD_SIZE",
    "MAX_RESTARTS",
    "NO_SPLIT",
    "PAPER_EPOCHS",
    "PAPER_MILESTONE",
    "BenchConfig",
    "Caching",
    "CompileMode",
    "Cutting",
    "DemoConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "Jobs",
    "Labelling",
    "LabelsAddViewsConfig",
    "LabelsConvertConfig",
    "LabelsExportConfig",
    "LabelsFinishConfig",
    "LabelsImportConfig",
    "LabelsInfoConfig",
    "LabelsMergeConfig",
    "LabelsSplitConfig",
    "LabelsStatusConfig",
    "LabelsVerifyConfig",
    "Machine",
    "NewEncoding",
    "OnBadImage",
    "PackConfig",
    "PrecomputeConfig",
    "PredictConfig",
    "Reading",
    "ReadyModel",
    "Settings",
    "SlurmDistillConfig",
    "SlurmJob",
    "SlurmPrecomputeConfig",
    "SlurmSweepConfig",
    "SlurmTraining",
    "StageCommand",
    "TrainConfig",
    "flag",
    "is_location",
    "plain",
    "spelling",
    "split_teachers",
]
