"""MEAL, the method before MEAL V2: one teacher a batch, compared with the student block by block.

Shen, He and Xue, AAAI 2019. The formulas are those of its code for CIFAR-10.
"""

from mealv2.meal.alignment import POOLS, Pool, align
from mealv2.meal.blocks import BlockLayers, block_outputs
from mealv2.meal.losses import BLOCK_LOSSES, BlockLoss, block_loss
from mealv2.meal.pairing import Network, pair_blocks
from mealv2.meal.stored import StoredTeachers
from mealv2.meal.task import MealTask, block_discriminators
from mealv2.meal.teachers import SelectedTeachers, TeacherMode, TeacherSelection

__all__ = [
    "BLOCK_LOSSES",
    "POOLS",
    "BlockLayers",
    "BlockLoss",
    "MealTask",
    "Network",
    "Pool",
    "SelectedTeachers",
    "StoredTeachers",
    "TeacherMode",
    "TeacherSelection",
    "align",
    "block_discriminators",
    "block_loss",
    "block_outputs",
    "pair_blocks",
]
