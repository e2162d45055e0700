"""Device kernels: in Triton's interpreter on CPU tensors by default, on a GPU with TRITON_INTERPRET=0."""

import pytest
import torch

from kvq.kernels.choice import interpreted, triton_version


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; skips where they cannot."""
    if triton_version() is None:
        pytest.skip("triton is not installed")
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 asks for a CUDA device, and there is none")
    return torch.device("cuda")
