"""For all tests: no network, whatever the machine, and no more threads in all than there are cores.

Set here because huggingface_hub and OpenMP read them when they are imported; scripts that tests start inherit them.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
