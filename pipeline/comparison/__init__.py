"""A base and a distilled backbone: what they start from, runs over modes and seeds, the table."""
