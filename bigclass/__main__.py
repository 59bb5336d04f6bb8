"""`python -m bigclass`: see `bigclass.cli`."""

import sys

from bigclass.cli import main

# The demo measures memory in spawned children, which import this module again.
if __name__ == "__main__":
    sys.exit(main())
