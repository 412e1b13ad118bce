"""Image sources: folders, tar files, packed JPEGs; keys and pixels. `open_source` is on top."""
