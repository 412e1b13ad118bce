"""A task for timm's training loop: train a timm model from a label set, with the discriminator."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import group_parameters
from timm.utils import model as timm_models
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mealv2.models import Classifier, Preprocessing
from mealv2.models.discriminator import Discriminator
from mealv2.soft_labels import Labels, SoftLabels
from mealv2.targets import BatchTargets
from mealv2.task import DistillTask, TaskResult

try:
    from timm.task import TrainingTask
except ImportError as error:
    raise ImportError("SoftLabelTask needs timm 1.0.23: pip install --upgrade timm") from error

_STUDENT = "student.backbone"  # the name of timm's model in the trainable module


class _Trainable(DistillTask):
    """The DistillTask of a timm model, with what timm's optimizers ask a model for."""

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the model wants without weight decay."""
        of_model: set[str] = getattr(self.student.backbone, "no_weight_decay", set[str])()
        return {f"{_STUDENT}.{name}" for name in of_model}

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return the layer of each parameter for ``--layer-decay``; the discriminator's: the last.

        As timm's FeatureDistillationTrainableModule does for its projection.
        """
        model: Any = self.student.backbone
        if not hasattr(model, "group_matcher"):
            return {}
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)

        def layer_of(name: str) -> Any:
            return layers.get(name.removeprefix(f"{_STUDENT}."), last)

        return layer_of


class SoftLabelTask(TrainingTask):
    """Train a timm model from the items of a SoftLabelDataset, as a task of timm's loop.

    ``model`` gets images normalised with ``mean`` and ``std``, by default those of its
    ``pretrained_cfg``. The input of a call is uint8, B x 3 x S x S (or float in [0, 1]); the target
    has labels of B rows, BatchTargets (``label="targets"``) or probabilities B x C; the result is
    that of DistillTask, with the loss terms by name. With a ``discriminator`` of as many classes
    its loss is added, and its weights are task state in timm's checkpoints; the model keeps
    timm's own keys there. ``settings`` are those of DistillTask.
    """

    def __init__(
        self,
        model: nn.Module,
        discriminator: Discriminator | None = None,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        if (mean is None or std is None) and not {"mean", "std"} <= config.keys():
            raise ValueError("the model has no pretrained_cfg: give mean and std")
        preprocessing = Preprocessing(tuple(mean or config["mean"]), tuple(std or config["std"]))
        student = Classifier(model, tag="", preprocessing=preprocessing)
        self.trainable_module: nn.Module = _Trainable(student, discriminator, **settings)
        self.trainable_module.to(self.device)
        self._is_prepared = discriminator is None

    @property
    def _task(self) -> _Trainable:
        task: _Trainable = _unwrapped(self.trainable_module)
        return task

    def forward(  # type: ignore[override]  # parts is a dict
        self, input: Tensor, target: Tensor | Labels | BatchTargets
    ) -> TaskResult:
        """Return the loss of a batch, the logits and the loss terms."""
        targets = _as_targets(target)
        if not self._is_prepared:
            self._is_prepared = True
            if not isinstance(self.trainable_module, DistributedDataParallel):
                self._task.prepare(input, targets)
        result: TaskResult = self.trainable_module(input, targets)
        return result

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> "SoftLabelTask":
        """Wrap student and discriminator in DistributedDataParallel."""
        self.trainable_module = DistributedDataParallel(
            self.trainable_module, device_ids=device_ids, **ddp_kwargs
        )
        return self

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> Any:
        """Compile the student, for training and for evaluation; return timm's model, compiled."""
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        student: Any = self._task.student
        self._task.compiled_student = torch.compile(student, **options)
        self.eval_model = torch.compile(student.backbone, **options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """Return timm's model: it gets normalised images, as timm's validation gives them."""
        resolved = super().get_eval_model(module, ema=ema)
        found = _unwrapped(resolved)
        return found.student.backbone if isinstance(found, _Trainable) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the parameters for gradient clipping."""
        own = list(self._task.student.parameters())
        others = self._task.discriminator
        return (own[:-2] if exclude_head else own) + list(others.parameters() if others else ())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the discriminator's weights."""
        found = self._discriminator(module, ema=ema)
        return {} if found is None else {"discriminator": found.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load the discriminator's weights; they are not drawn again."""
        found = self._discriminator(module, ema=ema)
        if found is not None and state and "discriminator" in state:
            found.load_state_dict(state["discriminator"], strict=strict)
            self._is_prepared = True

    def _discriminator(self, module: nn.Module | None, *, ema: bool) -> Discriminator | None:
        module = self.get_trainable_module(ema=ema) if module is None else module
        found = None if module is None else _unwrapped(module).discriminator
        assert found is None or isinstance(found, Discriminator)
        return found


def _unwrapped(module: Any) -> Any:
    """Return a module without its DistributedDataParallel, moving average or compilation."""
    return timm_models.unwrap_model(module)  # type: ignore[no-untyped-call]


def _as_targets(target: Tensor | Labels | BatchTargets) -> BatchTargets:
    if isinstance(target, BatchTargets):
        return target
    return BatchTargets(SoftLabels.from_dense(target) if isinstance(target, Tensor) else target)
