"""`mealv2 report`: runs and their labels as one page, with figures and data beside it."""
