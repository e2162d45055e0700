"""What comes before every kind of statistic: padding left out, and an order of windows.

Shape letters: B batch, K key/value heads, T tokens, N real tokens of all rows, D head dim.
"""

import hashlib

import torch


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
