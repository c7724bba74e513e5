"""The command line: the composition root that starts processes and asks them."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is loaded: what matters we say ourselves, in one line
