"""From image sources to batches of views: threads, order, transfer to the device."""
