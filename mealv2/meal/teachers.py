"""Targets of MEAL: the blocks of the teacher that is drawn for a batch, or of all teachers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mealv2.errors import DataError
from mealv2.hash_draws import below, hash_words
from mealv2.meal.blocks import BlockLayers
from mealv2.models.ensemble import ONE_SIZE, BySize, TeacherEnsemble
from mealv2.targets import ONLINE, BatchTargets, Targets, class_ids

TeacherSelection = Literal["random", "round-robin", "all"]
TeacherMode = Literal["eval", "train"]

_PURPOSE = "meal-teacher"


def drawn_teachers(
    num_teachers: int, selection: TeacherSelection, *, seed: int, step: int
) -> tuple[int, ...]:
    """Return the teachers of a step, counted from 1: a pure function of its arguments."""
    if selection == "all":
        return tuple(range(num_teachers))
    if selection == "round-robin":
        return ((step - 1) % num_teachers,)
    return (below(num_teachers, next(hash_words(_PURPOSE, "", seed, step))),)


class SelectedTeachers(Targets):
    """Blocks of one teacher a step, computed from the pixels of the batch; epoch e uses view e.

    ``random`` draws the teacher uniformly from (seed, step) (MEAL: one a mini-batch, unseeded),
    ``round-robin`` takes the teachers in turn, ``all`` gives the blocks of every teacher. All rows
    of a step have the same teachers. With ``mode`` train they normalise by the statistics of the
    batch, and their running statistics drift, as in MEAL's code; they have no gradient.
    """

    def __init__(
        self,
        ensemble: TeacherEnsemble,
        layers: BlockLayers,
        classes: Sequence[int] = (),
        *,
        seed: int,
        selection: TeacherSelection = "random",
        mode: TeacherMode = "eval",
    ) -> None:
        self.ensemble = ensemble
        self.layers = layers
        self.other_sizes = ensemble.other_sizes
        self._classes = classes
        self._seed = seed
        self._selection = selection
        self._mode = mode

    def view(self, key: str, epoch: int) -> int:
        return epoch

    @torch.no_grad()
    def batch(
        self,
        positions: Sequence[int],
        views: Sequence[int],
        images_BCHW: Tensor,
        by_size: BySize = ONE_SIZE,
        *,
        step: int = 1,
    ) -> BatchTargets:
        chosen = drawn_teachers(
            len(self.ensemble.teachers), self._selection, seed=self._seed, step=step
        )
        return BatchTargets(
            classes_B=class_ids(self._classes, positions),
            blocks=tuple(self._blocks(number, images_BCHW, by_size) for number in chosen),
            label_counts={ONLINE: len(positions)},
        )

    def _blocks(self, number: int, images_BCHW: Tensor, by_size: BySize) -> tuple[Tensor, ...]:
        """Return the blocks of a teacher, which leaves this function in eval mode.

        Raises DataError for one image that a teacher in train mode cannot normalise.
        """
        teacher, size = self.ensemble.teachers[number], self.ensemble.img_sizes[number]
        teacher.train(self._mode == "train")
        try:
            blocks, _ = self.layers.outputs(teacher, images_BCHW if size is None else by_size[size])
        except ValueError as error:
            if len(images_BCHW) > 1 or "per channel" not in str(error):
                raise
            raise DataError(
                "a teacher in train mode cannot normalise a batch of one image: use a larger "
                "--batch-size, or --teacher-mode eval"
            ) from error
        finally:
            teacher.eval()
        return tuple(blocks)

    def state(self) -> dict[str, Any]:
        """Return the buffers that training steps change; of teachers in train mode alone."""
        if self._mode == "eval":
            return {}
        return {name: buffer.clone() for name, buffer in self.ensemble.named_buffers()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state; raises KeyError for that of other teachers."""
        if self._mode == "train":
            for name, buffer in self.ensemble.named_buffers():
                buffer.copy_(state[name])
