"""Reads views of images in threads: one path for both stages and validation."""
