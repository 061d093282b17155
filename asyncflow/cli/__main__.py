"""`python -m asyncflow.cli` is `asyncflow`."""

import sys

from asyncflow.cli.main import main

sys.exit(main())
