"""`python -m refimpl` is the command line."""

import sys

from refimpl.cli import main

sys.exit(main())
