"""Pixels on their way to the device while it is still busy with the batch before."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from pipeline.loaders import Pixels


def on_device(pixels: Iterable[Pixels], device: torch.device) -> Iterator[Pixels]:
    """Yield the same batches with their images on a device, in the same memory layout.

    On a GPU they are copied on a stream of their own, from pinned memory. Nothing is read ahead: a
    host that never waits for the device is ahead of it, and so are its copies.
    """
    if device.type != "cuda":
        for item in pixels:
            yield replace(item, images_BCHW=item.images_BCHW.to(device))
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for item in pixels:
        with torch.cuda.stream(copies):
            images_BCHW = item.images_BCHW.to(device, non_blocking=True)
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copies)
        # else the next copy may take this memory while the networks still read it
        images_BCHW.record_stream(computing)
        yield replace(item, images_BCHW=images_BCHW)
