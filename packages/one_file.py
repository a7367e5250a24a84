"""Starts the exporter from the zipapp, the file that contains all of it."""

import sys

# Any Python must understand this, because here too old ones get an error.
if sys.version_info < (3, 11):
    sys.exit(
        "dtrace-exporter: Python 3.11 or newer is needed, this one is %d.%d: name another, as in"
        " python3.11 %s" % (sys.version_info[0], sys.version_info[1], sys.argv[0])
    )

from dtrace_exporter.cli import main

sys.exit(main())
