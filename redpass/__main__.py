"""`python -m redpass` is the command `redpass`."""

import sys

from redpass.cli import main

sys.exit(main())
