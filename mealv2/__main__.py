"""Run the command line: torchrun starts it as ``torchrun … -m mealv2 distill …``."""

import cli

if __name__ == "__main__":
    cli.main()
