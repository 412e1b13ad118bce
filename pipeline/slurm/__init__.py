"""The `mealv2 slurm` commands: a stage as a batch script that is kept, and submitted."""
