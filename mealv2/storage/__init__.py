"""Files, URLs, object stores, caches and JSON; nothing here knows of labels or images."""
