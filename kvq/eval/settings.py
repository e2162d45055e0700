"""What to evaluate and how, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvq.errors import DataError
from kvq.eval.probes import PROBES
from kvq.eval.task_files import task_names
from kvq.eval.two_view_attention import Schedule
from kvq.models.builtin import cache_root

TEXT_TASKS, SPEED = ("perplexity", "divergence"), "speed"
# kvq's own tasks; every other name is lm-eval's.
OWN_TASKS = (*TEXT_TASKS, *PROBES, SPEED)
DEFAULT_TASKS = TEXT_TASKS
DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the models.

    tasks       perplexity and divergence on a text; needle, multi_key, variable_tracking, copy_json, copy_code and
                drift on generated texts; speed; and lm-eval tasks by name or file (.yaml). A file becomes the name that
                it states; task_files: the files by name.
    data        the text: ``builtin`` (its evaluation part), a .txt file, a .jsonl or .parquet file with a field
                ``text``, or a hub id. Tokenised once, without special tokens. Generated texts are made of it too.
    seq_len     tokens a window; by default 2,048, or the model's maximum if that is less.
    stride      tokens from one window to the next (default: seq_len); see ``kvq.eval.perplexity``.
    lengths     tokens of generated texts; None: each task's own.
    limit       windows of the text, generated texts a length, and documents of each lm-eval task.
    mode        stream, prefill, chunked or simulate; see ``kvq.eval.two_view_attention``.
    chunk       tokens a chunk (chunked).
    task_dir    folder with lm-eval task files; then no other lm-eval task is known.
    task_data   folder with rows for the tasks of ``kvq.eval.local``.
    fewshot     examples in a prompt of lm-eval tasks; None: each task's own number. chat: prompts go through the
                tokenizer's chat template.
    batch_size  windows, or requests, a forward; generated texts go one by one.
    cache       folder for answers of runs that may be interrupted; None: kept in memory only. By default a folder of
                the user's cache.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    data: str | Path = "builtin"
    seq_len: int | None = None
    stride: int | None = None
    lengths: tuple[int, ...] | None = None
    limit: int | None = None
    mode: str = "stream"
    chunk: int = 512
    task_dir: str | Path | None = None
    task_data: str | Path | None = None
    fewshot: int | None = None
    chat: bool = False
    batch_size: int = 1
    seed: int = 0
    cache: str | Path | None = "default"
    task_files: Mapping[str, Path] = field(init=False, default_factory=dict)

    def __post_init__(self):
        if isinstance(self.tasks, str) or not self.tasks:
            raise DataError(f"tasks={self.tasks!r} is not a list of tasks: give for example ('perplexity', 'needle').")
        self._find_task_files()
        Schedule.check(self.mode, self.chunk)
        for name, what in (("batch_size", "is not a number of windows"), ("limit", "leaves nothing to score")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name}={value} {what}: use 1 or more.")
        if self.fewshot is not None and self.fewshot < 0:
            raise DataError(f"fewshot={self.fewshot} is not a number of examples: use 0 or more.")
        if self.lengths is not None:
            object.__setattr__(self, "lengths", tuple(self.lengths))
        for length in self.lengths or ():
            if isinstance(length, bool) or not isinstance(length, int) or length < 64:
                raise DataError(f"lengths={length!r} has no room for something hidden: use 64 or more.")

    def _find_task_files(self) -> None:
        names = task_names(self.tasks)
        files = {name: file for name, file in names.items() if file is not None}
        for name, file in files.items():
            if name in OWN_TASKS:
                raise DataError(f"task file {file.name!r} takes the name of kvq's own task {name!r}: rename its task.")
        object.__setattr__(self, "tasks", tuple(names))
        object.__setattr__(self, "task_files", files)

    @property
    def text_tasks(self) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name in TEXT_TASKS)

    @property
    def probes(self) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name in PROBES)

    @property
    def foreign(self) -> tuple[str, ...]:
        return tuple(name for name in self.tasks if name not in OWN_TASKS)

    @property
    def cache_folder(self) -> Path | None:
        if self.cache == "default":
            return cache_root() / "answers"
        return None if self.cache is None else Path(self.cache)

    def window(self, longest: int) -> int:
        """Tokens of a window for a model that takes ``longest``."""
        if self.seq_len is None:
            return min(DEFAULT_SEQ_LEN, longest)
        shortest = 4 if self.mode == "prefill" else 2
        if self.seq_len < shortest:
            raise DataError(
                f"seq_len={self.seq_len} leaves nothing to score in mode {self.mode!r}: use {shortest} or more."
            )
        if self.seq_len > longest:
            raise DataError(
                f"seq_len={self.seq_len} is more than the {longest} tokens this model takes: use at most {longest}."
            )
        return self.seq_len

    def check_model(self, longest: int) -> None:
        for length in self.lengths or ():
            if length > longest:
                raise DataError(f"lengths={length} is more than the {longest} tokens this model takes: use fewer.")
