"""The entry point of `python -m distill_cli`."""

import sys

from distill_cli.main import main

sys.exit(main())
