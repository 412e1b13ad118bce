"""MEAL V2 as a library: label views with teachers once, distil students from the labels.

Import what you need from the rooms (``mealv2.views``, ``mealv2.label_set``, ``mealv2.losses``, …);
this one imports nothing, so that a command line can start without torch.
"""

__version__ = "0.1.0.dev0"
