"""Stage one: plan a label set, run the teachers on views, write shards, write the manifest."""
