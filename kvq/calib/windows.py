"""Token windows: packed end to end out of joined documents, or one document each.

Every window starts as the runtime would start it: with the special tokens that the tokenizer puts before a text (BOS),
because models put their attention sinks there.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from kvq.calib.data import SEPARATOR, DataIdentity, Document, source_name, tokenizer_hash
from kvq.errors import DataError, first_line


@dataclass(frozen=True, kw_only=True)
class Windows:
    """tokens   int64 [N, T].
    valid    bool [N, T], False for padding; None: no padding.
    """

    tokens: torch.Tensor
    identity: DataIdentity
    valid: torch.Tensor | None = None


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
    source: str | Path = "text",
    packed: bool = True,
    chat_template: bool = False,
) -> Windows:
    """Cut ``samples`` windows of ``seq_len`` tokens out of documents; a seeded choice without repetition, in order.

    packed          documents are joined (texts with a blank line between), tokenised once and cut end to end. False:
                    a window is one document, cut at ``seq_len`` or padded on the right; a lone text is taken by its
                    paragraphs.
    chat_template   a text is one message of a user (a lone text: each paragraph) in the tokenizer's chat template.
                    Conversations always go through it.

    Raises DataError if the text is too short, or the tokenizer lacks the template.
    """
    if samples < 1 or seq_len < 2:
        raise DataError(f"samples={samples}, seq_len={seq_len} give no tokens: use at least 1 sample of 2 tokens.")
    pieces = list(documents)
    if (chat_template or not packed) and len(pieces) == 1 and isinstance(pieces[0], str):
        pieces = [piece for piece in re.split(r"\n\s*\n", pieces[0]) if piece.strip()]
    chat = chat_template or any(not isinstance(piece, str) for piece in pieces)
    if chat:
        pieces = _through_template(tokenizer, pieces)
    prefix = _prefix(tokenizer)
    if len(prefix) >= seq_len:
        raise DataError(f"seq_len={seq_len} has no room beside {len(prefix)} special tokens: use longer windows.")
    cut = _packed if packed else _by_document
    tokens, valid = cut(tokenizer, pieces, prefix, samples, seq_len, seed, "" if chat else SEPARATOR)
    identity = DataIdentity(
        source=source_name(source),
        text_sha256=_sha256(json.dumps(list(documents))),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        tokens=tokens.numel() if valid is None else int(valid.sum()),
        form="packed" if packed else "documents",
        chat_template=_sha256(str(tokenizer.chat_template)) if chat else "",
        windows_sha256=windows_hash(tokens, valid),
    )
    return Windows(tokens=tokens, valid=valid, identity=identity)


def windows_hash(tokens: torch.Tensor, valid: torch.Tensor | None) -> str:
    """SHA-256 of token ids [N, T] and padding; ids under padding do not count."""
    real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    digest = hashlib.sha256(str(tuple(tokens.shape)).encode())
    digest.update(real.numpy().tobytes() + tokens.masked_fill(~real, 0).numpy().tobytes())
    return digest.hexdigest()


def _packed(tokenizer, pieces, prefix: list[int], samples: int, seq_len: int, seed: int, separator: str):
    own = seq_len - len(prefix)
    # verbose=False: a text longer than the model's context is the rule here, not a mistake.
    ids = tokenizer(separator.join(pieces), add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // own
    if windows < samples:
        way = f"use at most {windows} samples, or more text" if windows else "use shorter windows, or more text"
        raise DataError(
            f"samples={samples} of seq_len={seq_len} need {samples * own:,} tokens and the text has {len(ids):,}: "
            f"{way}."
        )
    chosen = _chosen(windows, seed)[:samples].sort().values
    tokens = torch.tensor(ids[: windows * own], dtype=torch.int64).view(windows, own)[chosen]
    head = torch.tensor(prefix, dtype=torch.int64).expand(samples, -1)
    return torch.cat([head, tokens], dim=1), None


def _by_document(tokenizer, pieces, prefix: list[int], samples: int, seq_len: int, seed: int, separator: str):
    found: dict[int, list[int]] = {}
    for number in _chosen(len(pieces), seed).tolist():
        ids = tokenizer(pieces[number], add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if ids[: len(prefix)] == prefix else prefix + ids
        # A lone token has nothing to attend to.
        if len(ids) >= 2:
            found[number] = ids[:seq_len]
        if len(found) == samples:
            break
    if len(found) < samples:
        raise DataError(
            f"samples={samples} documents are needed and the data has {len(found)} of two tokens or more: use at most "
            f"{len(found)} samples, more data, or packed windows."
        )
    rows = [found[number] for number in sorted(found)]
    # Rows without padding are cut to the longest document.
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in rows], dtype=torch.int64)
    lengths = torch.tensor([len(ids) for ids in rows])
    valid = torch.arange(longest) < lengths.unsqueeze(1)
    return tokens, None if bool(valid.all()) else valid


def _chosen(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _through_template(tokenizer, pieces: Sequence[Document]) -> list[str]:
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template for conversations: use an instruct model, or data that are plain text."
        )
    found = []
    for number, piece in enumerate(pieces, start=1):
        conversation = [{"role": "user", "content": piece}] if isinstance(piece, str) else piece
        try:
            found.append(tokenizer.apply_chat_template(conversation, tokenize=False))
        # Templates raise what they like (jinja2.TemplateError and others).
        except Exception as error:
            why = first_line(error)
            raise DataError(f"the chat template refuses conversation {number} ({why}): mend or remove it.") from None
    return found


def _prefix(tokenizer) -> list[int]:
    """Ids of the special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(plain) + 1):
        if plain and marked[start : start + len(plain)] == plain:
            return marked[:start]
    return []


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
