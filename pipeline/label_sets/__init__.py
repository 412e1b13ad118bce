"""The `mealv2 labels` commands: one room each; writing.py is what those share that make a set."""
