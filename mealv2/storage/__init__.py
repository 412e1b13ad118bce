"""Files, URLs, object stores, caches and JSON, independent of labels and images."""
