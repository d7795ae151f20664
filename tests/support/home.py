"""The loopback Hub of a test process, and the environment by which the real client finds it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hub import Hub

HUB = Hub()
HUB.start()
HF_HOME = tempfile.mkdtemp(prefix="hf-tsv-test-home-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)

# Frozen when huggingface_hub is imported, so set before anything imports it.
ENVIRONMENT = {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_HOME": HF_HOME,
    "HF_TOKEN": "hf_write",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",  # tests run side by side; threads that compete are far slower
}
os.environ.update(ENVIRONMENT)
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "HF_DEBUG"):
    os.environ.pop(name, None)
