"""Run the command line as ``python -m dtrace_exporter``."""

import sys

from dtrace_exporter.cli import main

sys.exit(main())
