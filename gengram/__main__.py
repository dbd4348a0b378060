"""`python -m gengram` is the `gengram` command."""

import sys

from .cli import main

sys.exit(main())
