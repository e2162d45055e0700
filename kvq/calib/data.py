"""Calibration text: the Python installation's own (``builtin``), a file, or a data set of the hub.

A document is a text, or a conversation: a list of messages, each a mapping with ``role`` and ``content``.
"""

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kvq.errors import DataError, ModelNotFoundError, first_line
from kvq.models.resolve import looks_like_path

BUILTIN_TEXT = "builtin"
SEPARATOR = "\n\n"
# Characters read from a hub data set, in its own order: about five million tokens, far more than calibration uses.
HUB_CHARACTERS = 20_000_000
_READERS = (".txt", ".jsonl", ".parquet")
# The column of conversations, by the custom of the hub.
MESSAGES = "messages"

Document = str | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """What the tokens were: equal identities are equal tokens.

    source            ``builtin``, a file's name without its folder, or a hub id.
    text_sha256       of the documents that were read (UTF-8).
    tokenizer_sha256  of the tokenizer's vocabulary and rules.
    samples, seq_len  windows, and tokens per window, padding included.
    seed              of the choice of windows.
    tokens            tokens in all windows, without padding.
    form              ``packed`` or ``documents``.
    chat_template     SHA-256 of the chat template, empty if none was applied.
    windows_sha256    of the windows themselves: token ids and padding.
    """

    source: str
    text_sha256: str
    tokenizer_sha256: str
    samples: int
    seq_len: int
    seed: int
    tokens: int
    form: str = "packed"
    chat_template: str = ""
    windows_sha256: str = ""

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)

    def join(self, other: "DataIdentity") -> "DataIdentity":
        """Identity of both sets of windows together; hashes are of both hashes. Raises DataError for the same windows.

        seed and form are the first's, seq_len is the longest.
        """
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            raise DataError("statistics of different tokenizers cannot be joined: calibrate again.")
        if self.windows_sha256 == other.windows_sha256:
            raise DataError("both statistics are of the same windows, which would count twice: join others.")

        def both(name: str) -> str:
            return hashlib.sha256((getattr(self, name) + getattr(other, name)).encode()).hexdigest()

        return replace(
            self,
            source=f"{self.source} + {other.source}",
            text_sha256=both("text_sha256"),
            windows_sha256=both("windows_sha256"),
            samples=self.samples + other.samples,
            seq_len=max(self.seq_len, other.seq_len),
            tokens=self.tokens + other.tokens,
        )


def builtin_text(part: str) -> str:
    """Return the ``calibration`` or the ``evaluation`` part of the reference that every Python carries.

    The text is ``pydoc_data.topics``, the language reference as pydoc shows it (about 0.2 million characters a part).
    Rule: a topic belongs to calibration if the first byte of SHA-256 of its name is even, so a topic stays in its part
    in every release of Python. Topics quote each other, so a paragraph that occurs in calibration is left out of
    evaluation. The wording differs between Python releases: compare results by the text's hash.
    """
    if part not in ("calibration", "evaluation"):
        raise DataError(f"the builtin text has no part {part!r}: use 'calibration' or 'evaluation'.")
    return _builtin_parts()[part == "evaluation"]


@functools.cache
def _builtin_parts() -> tuple[str, str]:
    from pydoc_data.topics import topics

    parts: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for name in sorted(topics):
        odd = hashlib.sha256(name.encode()).digest()[0] % 2
        parts[odd].update(dict.fromkeys(re.split(r"\n\s*\n", topics[name].strip())))
    calibration, evaluation = parts
    return SEPARATOR.join(calibration), SEPARATOR.join(p for p in evaluation if p not in calibration)


def load_texts(
    source: str | Path, *, part: str = "calibration", field: str = "text", split: str = "train"
) -> list[str]:
    """Read the texts of a source, in its own order.

    source   ``builtin``; a file: .txt (one text), .jsonl or .parquet (one text a row); or a hub id, ``owner/name`` or
             ``owner/name:config``, of which the first 20 million characters are read.
    part     of the builtin text only.
    field    the column that holds the text (.jsonl, .parquet and hub).
    split    of a hub data set only.

    Raises ModelNotFoundError if there is no such source or it cannot be fetched, DataError if it holds no usable text.
    """
    texts = load_documents(source, part=part, field=field, split=split)
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DataError(
                f"row {number} of {source_name(source)!r}: field {field!r} is {type(text).__name__}, not text: name "
                "another field."
            )
    return texts


def load_documents(
    source: str | Path, *, part: str = "calibration", field: str | None = None, split: str = "train"
) -> list[Document]:
    """Read the documents of a source as ``load_texts`` does; rows may be conversations.

    field   the column that holds texts or conversations; None: ``messages`` where a row has it, else ``text``.
    """
    if source == BUILTIN_TEXT:
        return [builtin_text(part)]
    path = Path(source).expanduser()
    if path.is_dir():
        raise DataError(f"data {str(source)!r} is a folder: give one of its files ({', '.join(_READERS)}).")
    if path.exists():
        documents = _read_file(path, field)
    elif isinstance(source, Path) or looks_like_path(source) or path.suffix in _READERS:
        raise ModelNotFoundError(
            f"data file {str(source)!r} does not exist: check the path, or use {BUILTIN_TEXT!r} or a hub id."
        )
    else:
        documents = _read_hub(source, field, split)
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise DataError(f"data {str(source)!r} holds no text: give a file or a field with text in it.")
    return documents


def source_name(source: str | Path) -> str:
    """The name that provenance records: never a folder of this machine."""
    return Path(source).name if Path(source).expanduser().exists() else str(source)


def _read_file(path: Path, field: str | None) -> list[Document]:
    if path.suffix not in _READERS:
        raise DataError(f"data file {path.name!r} is of no known kind: use one of {', '.join(_READERS)}.")
    try:
        if path.suffix == ".parquet":
            return _parquet_rows(path, field)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"data file {path.name!r} is not UTF-8 text: save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"data file {path.name!r} cannot be read ({error.strerror or error}): check it.") from None
    return [text] if path.suffix == ".txt" else _json_rows(path.name, text, field)


def _json_rows(name: str, text: str, field: str | None) -> list[Document]:
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(f"line {number} of {name!r} is not JSON: write one object a line.") from None
            rows.append(_document(row, field, f"line {number} of {name!r}"))
    return rows


def _document(row: object, field: str | None, where: str) -> Document:
    """The document of one row. Raises DataError naming the columns that exist."""
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object: write one object a line, with a field {field or 'text'!r}.")
    if field is None:
        field = MESSAGES if MESSAGES in row else "text"
    if field not in row:
        raise DataError(f"{where} has no field {field!r} (it has {', '.join(map(str, row)) or 'none'}): name another.")
    found = row[field]
    if isinstance(found, str):
        return found
    if isinstance(found, list) and found and all(map(_is_message, found)):
        return [{"role": message["role"], "content": message["content"]} for message in found]
    raise DataError(
        f"{where}: field {field!r} is {type(found).__name__}, not text and no list of messages with 'role' and "
        "'content': name another field."
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _parquet_rows(path: Path, field: str | None) -> list[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _no_extra(f"parquet file {path.name!r}") from None
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if field is None:
            field = MESSAGES if MESSAGES in columns else "text"
        rows = file.read(columns=[field]).column(0).to_pylist() if field in columns else None
    except ArrowException as error:
        raise DataError(f"data file {path.name!r} is not readable parquet ({str(error)[:100]}): mend it.") from None
    if rows is None:
        raise DataError(f"data file {path.name!r} has no field {field!r} (it has {', '.join(columns)}): name another.")
    return [_document({field: row}, field, f"row {i} of {path.name!r}") for i, row in enumerate(rows)]


def _read_hub(name: str, field: str | None, split: str) -> list[Document]:
    try:
        import datasets
    except ImportError:
        raise _no_extra(f"hub data set {name!r}") from None
    repository, _, config = name.partition(":")
    documents, characters = [], 0
    try:
        for row in datasets.load_dataset(repository, config or None, split=split, streaming=True):
            documents.append(_document(row, field, f"data set {name!r}"))
            characters += len(documents[-1]) if isinstance(documents[-1], str) else len(str(documents[-1]))
            if characters > HUB_CHARACTERS:
                break
    except DataError:
        raise
    # datasets passes on the errors of its many file systems and of data-set scripts.
    except Exception as error:
        raise ModelNotFoundError(
            f"data set {name!r} is neither a file nor to be had from the hub ({first_line(error)}): give a "
            f".txt, .jsonl or .parquet file, or {BUILTIN_TEXT!r}."
        ) from None
    return documents


def _no_extra(what: str) -> DataError:
    return DataError(f"{what} cannot be read without the package 'datasets': run 'pip install 'kvq-toolkit[data]''.")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a tokenizer's ids: the rules of a fast tokenizer, the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    # State of the last call, not of the tokenizer.
    rules = {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
