"""Ratios against peers, side by side in one run; never a timed test. Importing it pins every library to one thread."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"  # they read it when they are loaded, in this process and in those that it starts
