"""Object detection with a distilled backbone: views of whole images, targets, task, metrics."""
