"""MEAL V2 as a library: label views with teachers once, then distil students from the labels.

Import from the submodules (``mealv2.views``, ``mealv2.label_set``, ``mealv2.losses``, …). This
package imports nothing, so that the command line starts without torch.
"""

__version__ = "0.1.0.dev0"
