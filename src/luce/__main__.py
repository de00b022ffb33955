"""``python -m luce`` is the command ``luce``."""

import sys

from .cli import main

sys.exit(main())
