"""Settings of all tests: no network on any machine, and at most as many threads in total as there are cores.

huggingface_hub and OpenMP read these variables when they are imported. Scripts that tests start inherit them.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
