"""The text of a search, cut into parts that share no token: measuring, choosing, confirming."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvq.calib.data import load_texts, source_name
from kvq.errors import DataError
from kvq.eval.text_tasks import text_ids


@dataclass(frozen=True, kw_only=True)
class Text:
    """Windows int64 [N, T] of each part, and what they are: equal identities are equal tokens."""

    measuring: torch.Tensor
    choosing: torch.Tensor
    confirming: torch.Tensor
    identity: dict[str, Any]


def cut_text(tokenizer, data: str | Path, verify_data: str | Path | None, settings) -> Text:
    """Cut whole windows out of ``data`` and deal a seeded choice of them to the parts; see ``search.Settings``.

    Of the builtin text it is the part that calibration leaves alone. verify_data, if given, has the confirming windows.

    Raises DataError if a text has too few windows.
    """
    length = settings.seq_len
    wanted = settings.windows + settings.verify_windows * (1 if verify_data is not None else 2)
    first, identity = _windows(tokenizer, data, length, wanted, settings.seed)
    # Measuring comes last, so that more windows of it leave the other parts as they are.
    own = settings.verify_windows
    parts = {"choosing": first[:own], "confirming": first[own : wanted - settings.windows]}
    parts["measuring"] = first[wanted - settings.windows :]
    identity = {"search": identity}
    if verify_data is not None:
        parts["confirming"], identity["verify"] = _windows(
            tokenizer, verify_data, length, settings.verify_windows, settings.seed
        )
    return Text(**parts, identity=identity)


def _windows(tokenizer, data: str | Path, length: int, count: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
    texts = load_texts(data, part="evaluation")
    ids, identity = text_ids(tokenizer, data, texts)
    whole = len(ids) // length
    if whole < count:
        raise DataError(
            f"the search needs {count} windows of {length} tokens and {source_name(data)!r} has {whole}: use more "
            "text, shorter windows (--seq-len) or fewer (--windows, --verify-windows)."
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:count]
    # As calibration names its text, so that the same text is seen.
    identity["documents_sha256"] = hashlib.sha256(json.dumps(texts).encode("utf-8", "surrogatepass")).hexdigest()
    identity["windows"] = order.tolist()
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)[order], identity
