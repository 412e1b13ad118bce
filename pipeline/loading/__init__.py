"""Open the images of a command, state what was found, compare them with the labelled ones."""
