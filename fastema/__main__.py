"""``python -m fastema`` is the ``fastema`` command."""

import sys

from fastema.cli import main

if __name__ == "__main__":
    sys.exit(main())
