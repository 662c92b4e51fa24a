"""`python -m metagen_jax`: the command `metagen`."""

import sys

from metagen_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
