"""`python -m split_common` is the `lambda-split` command."""

import sys

from split_common.cli import main

sys.exit(main())
