"""The machine under a command: device, ranks, environment, signals, seeds."""
