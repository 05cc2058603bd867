"""One thread for each test process, as for each rank of tests/distributed.py.

Several of them share the machine's cores; threads that wait for each other there made the suite many times slower.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; programs that tests start inherit it
