"""`python -m mealv2` is `mealv2`, so that torchrun can start it: `torchrun … -m mealv2 distill …`.

The one file of the library that knows the command line.
"""

import cli

if __name__ == "__main__":
    cli.main()
