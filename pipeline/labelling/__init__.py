"""Stage one: plan, annotate, write shards, finish with a manifest."""
