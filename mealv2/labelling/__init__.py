"""Stage one: the plan, the teachers' labels of views, shards, and the manifest."""
