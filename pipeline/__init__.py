"""The stages behind the command line: one room per command, each ``run(config) -> report``."""
