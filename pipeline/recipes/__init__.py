"""Published trainings, repeated: the commands `mealv2 recipes …` that need more than a recipe."""
