"""`python -m imgsvc.cli`."""

import sys

from imgsvc.cli import main

sys.exit(main())
