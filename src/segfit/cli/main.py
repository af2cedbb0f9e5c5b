"""The command ``segfit``: verbs in pipeline order, exit codes, errors in one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from io import TextIOWrapper
from types import FrameType
from typing import Annotated

import typer

from segfit.cli import machine, models, projects, results, stages
from segfit.cli.common import print_json
from segfit.cli.console import problem_table, say, wrapped
from segfit.cli.devices import with_team
from segfit.cli.help_pages import GroupedHelp
from segfit.errors import DatasetError, InputError, SegfitError, StoppedError
from segfit.execution.processors import affinity, available_workers
from segfit.text import count

__all__ = ["app", "main"]

_INTERRUPTED = 130  # what shells say of a process ended by Ctrl-C,
_ENDED = 128  # and, plus the signal, of others
_TALKATIVE = ("PIL", "matplotlib", "nibabel", "numcodecs", "pydicom", "tifffile", "zarr")  # libraries
_STOPPED = _ENDED + 15  # by a stop file, which is told as SIGTERM is: the same command goes on

app = typer.Typer(
    name="segfit",
    cls=GroupedHelp,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Self-configuring segmentation of biomedical images: from a folder of images and labels to a trained model "
    "and a report that says what happened and why. segfit run DATASET --time 2h does everything; each verb of the "
    "pipeline does what is missing and can be repeated.",
    epilog="segfit VERB -h lists the options of a verb. Exit codes: 0 done, 1 failed, 2 bad input, "
    "3 done but not to be trusted.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"segfit {version('segfit')}")
        raise typer.Exit


def _expect(given: str | None) -> None:
    from importlib.metadata import version

    if given is not None and given != (own := version("segfit")):
        problem = f"this machine has segfit {own}, and the task was submitted by segfit {given}"
        raise InputError(problem, "have one version on all machines, then submit the run again")


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    expect: Annotated[
        str | None, typer.Option("--expect", callback=_expect, hidden=True)  # given by tasks of a cluster
    ] = None,
) -> None:
    del version, expect


for verbs in (stages, results, projects, machine, models):
    verbs.add_to(app)


def main() -> None:
    """Run the command line and end the process.

    0 done, 1 failed, 2 bad input, 3 done but not to be trusted, 130 interrupted, 143 terminated.
    """
    _share_processors()
    _have_streams()
    _quiet_libraries()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _leave)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text that can be printed
    sys.exit(_flushed(run()))


def _share_processors() -> None:
    """Have OpenMP's threads sleep while they wait, and no more of them than a control group grants.

    What the user set stays. The runtimes (libgomp, Intel's, LLVM's) read it when torch loads them; workers inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if (granted := available_workers()) < affinity():  # the affinity they heed by themselves
        os.environ.setdefault("OMP_NUM_THREADS", str(granted))


def _quiet_libraries() -> None:
    """Leave out what libraries print by themselves: what bears on an image is told with its case.

    ``python -W default`` shows it.
    """
    for name in _TALKATIVE:
        logging.getLogger(name).addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=rf"({'|'.join(_TALKATIVE)}|segfit\.images)\b")


def _flushed(code: int) -> int:
    """Return the exit code, 1 instead of 0 if output is lost; what cannot be written is not tried again at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or 1
    return code


def _have_streams() -> None:
    """Open what the caller closed, or the next files would be taken for it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for good
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _leave(number: int, _: FrameType | None) -> None:
    """End through all `finally`, so that unfinished files go; a second signal does not wait for that."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(_ENDED + number)


def run(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code; nothing a user does wrong ends in a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        result = with_team(lambda: app(given or ["--help"], prog_name="segfit", standalone_mode=False))
    except DatasetError as error:
        _tell(f"{count(len(error.problems), 'problem')}; {error.outcome}")
        problem_table(error.problems)
        if "--json" in given:
            print_json({"problems": [item.facts | {"fatal": item.fatal} for item in error.problems]})
        return 2
    except InputError as error:
        _tell(f"segfit: {error}")
        return 2
    except StoppedError as error:
        _tell(f"segfit: {error}")
        return _STOPPED
    except SegfitError as error:
        _tell(f"segfit: {error}")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        result = _INTERRUPTED
    except SystemExit as end:
        result = end.code
    except BrokenPipeError:
        return 1
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        _tell(f"segfit: {file}{error.strerror or error}; fix this and rerun the command")
        return 1
    except MemoryError as error:
        _tell(f"segfit: there is not enough memory ({str(error) or 'no size was told'})")
        return 1
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # a usage error of the command line
            path = getattr(getattr(error, "ctx", None), "command_path", "segfit")
            message = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
            _tell(f"segfit: {message}{' See' if message.endswith('?') else '; see'} {path} --help")
            return int(error.exit_code)
        raise
    if isinstance(result, int) and result > _ENDED:  # the command line library may have caught the signal itself
        _tell("")
        _tell("stopped; the same command goes on where it was")
    return result if isinstance(result, int) else 0


def _tell(text: str) -> None:
    """Write a line to stderr; where that is not possible, the exit code has to do."""
    with suppress(OSError):
        say(wrapped(text, sys.stderr), sys.stderr)
