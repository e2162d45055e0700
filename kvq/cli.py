"""The command ``kvq``: the group, and how every error becomes one sentence and an exit code."""

import errno
import importlib
import os
import sys
from typing import Any

import click

from kvq.commands.common import quiet
from kvq.errors import KvqError, suggest

COMMANDS = (
    "calibrate",
    "export",
    "check",
    "eval",
    "compare",
    "report",
    "card",
    "generate",
    "search",
    "recipes",
    "inspect",
    "bench",
    "doctor",
)
# Modules whose command's name is a Python builtin.
_MODULES = {"eval": "evaluate"}

USAGE_ERROR = 2
INTERRUPTED = 130


class KvqGroup(click.Group):
    """Commands that are imported when named, and errors that end in one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"kvq.commands.{_MODULES.get(cmd_name, cmd_name)}").command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}.{suggest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        sys.exit(self._guarded(*args, **kwargs))

    def _guarded(self, *args: Any, **kwargs: Any) -> int:
        """Run a command and return the exit code; what a user can cause never shows a traceback."""
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
            return result if isinstance(result, int) else 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help())
            return USAGE_ERROR
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "kvq"
            return _fail(f"{_sentence(error.format_message())} See '{where} --help'.")
        except (KeyboardInterrupt, click.Abort):
            return _fail("Interrupted.", INTERRUPTED)
        except (KvqError, click.ClickException) as error:
            return _fail(error.format_message() if isinstance(error, click.ClickException) else str(error))
        except OSError as error:
            return _os_error(error)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            return _fail("the GPU is out of memory: use a smaller --batch-size or --seq-len, or another GPU.")
        except MemoryError:
            return _fail("memory is full: use a smaller --batch-size or --seq-len, or a smaller model.")


def _fail(message: str, code: int = USAGE_ERROR) -> int:
    # One line even where a library's text inside the sentence has several.
    click.echo(f"Error: {' '.join(message.split())}" if code == USAGE_ERROR else message, err=True)
    return code


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _os_error(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # The reader of our output has gone (head, less); Python would complain again at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    where = f" at {str(error.filename)!r}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(f"no space is left on the disk{where}: free some, or write to another place.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _fail(f"permission denied{where}: choose a place that you may write to, or change its permissions.")
    return _fail(f"{error.strerror or error}{where}: check the path and try again.")


@click.group("kvq", cls=KvqGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kvq-toolkit", prog_name="kvq", message="%(prog)s %(version)s")
def main() -> None:
    """Quantize the KV cache of a language model: calibrate, export, evaluate, generate.

    \b
    A whole run with the embedded model:
      kvq calibrate builtin -o stats.safetensors
      kvq export builtin --recipe kivi2 -o smollm2-kivi2
      kvq eval smollm2-kivi2 --limit 4
      kvq generate smollm2-kivi2 --prompt "What is a KV cache?"

    MODEL is a checkpoint folder, a hub id such as owner/name, or 'builtin' (SmolLM2-135M-Instruct).
    """
    quiet()


if __name__ == "__main__":
    main()
