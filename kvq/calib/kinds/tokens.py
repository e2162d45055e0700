"""What comes before every kind of statistic: padding left out, and an order of windows.

Shape letters: B batch, K key/value heads, T tokens, N real tokens of all rows, D head dim.
"""

import contextlib
import hashlib

import torch

# Tensors up to this many numbers are measured on one thread (about 10 ms at the limit).
SERIAL_NUMBERS = 2**22


def real_tokens(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """x [B, K, T, D] without its padding, [1, K, N, D].

    valid   bool [B, T], False for padding; None: no padding, x as it is.
    """
    if valid is None:
        return x
    # Padding never enters a reduction, so it may even be NaN.
    return x.transpose(1, 2)[valid].transpose(0, 1).unsqueeze(0)


def window_priorities(tokens: torch.Tensor, valid: torch.Tensor | None, seed: int = 0) -> torch.Tensor:
    """Pseudo-random int64 [B] that depends only on each row's real tokens [B, T] and the seed.

    A bounded selection of windows keeps those of the lowest numbers, so it does not depend on batches or processes.
    """
    found = []
    for row, ids in enumerate(tokens.cpu()):
        real = ids if valid is None else ids[valid[row].cpu()]
        digest = hashlib.sha256(f"{seed} ".encode() + real.to(torch.int64).numpy().tobytes()).digest()
        found.append(int.from_bytes(digest[:8], "little") >> 1)
    return torch.tensor(found, dtype=torch.int64)


@contextlib.contextmanager
def few_threads(x: torch.Tensor):
    """Run on one thread where more do not pay.

    Each pass over a layer's keys takes a tenth of a millisecond on one thread. Starting all threads for it gains
    nothing, and on a busy machine every start waits for the scheduler, which made calibration a fifth slower than plain
    forwards.
    """
    threads = torch.get_num_threads()
    if x.device.type != "cpu" or x.numel() > SERIAL_NUMBERS or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
