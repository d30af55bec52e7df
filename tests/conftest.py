"""Of several workers (`pytest -n 2`) each computes on one thread, its children too."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
