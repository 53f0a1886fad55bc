"""Run the ``fastema`` command as ``python -m fastema``."""

import sys

from fastema.cli import main

if __name__ == "__main__":
    sys.exit(main())
