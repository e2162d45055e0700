"""What a result was measured on."""

import os
import platform
from importlib.metadata import version

import torch


def machine() -> dict:
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "kvq": version("kvq-toolkit"),
    }
