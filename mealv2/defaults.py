"""Defaults that the library and the command line share."""

RATE = 0.001  # of the label codec: 17 to 40 bytes per view of 1,000 classes
IMG_SIZE = 224
SHARD_SIZE = 2048  # images per file of labels or of images; 225 MB of ImageNet
NUM_VIEWS = 16  # per image of a label set
