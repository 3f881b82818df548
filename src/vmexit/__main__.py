"""``python -m vmexit`` is ``vmexit``."""

import sys

from vmexit.cli import main

if __name__ == "__main__":
    sys.exit(main())
