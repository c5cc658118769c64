"""For all tests: no network, whatever the machine. Set here because huggingface_hub reads it when it is imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
