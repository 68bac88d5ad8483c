"""How a script begins and ends: settings from the command line; one line for what its user can put right."""

import contextlib
import errno
import gc
import io
import os
import re
import sys
import time
import traceback

import tyro

# What a user can put right about a disk or a folder.
REPAIRABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Something that the user can put right: ends the script with one line and this exit code."""

    code = 2


class Stopped(Exception):
    """A signal, whose number it carries, asked the run to end; all processes know, and what was done is saved."""


def first_line(e: BaseException) -> str:
    """What an error says, on one line of at most 300 letters, without what addresses hide."""
    lines = re.sub(r":\s*\n\s*", ": ", str(e).strip()).splitlines()
    return clean((lines or [type(e).__name__])[0])[:300]


def clean(text: str) -> str:
    """Text without the passwords and signatures that addresses can hold."""
    return re.sub(r"(https?://)[^/\s@]*@", r"\1", re.sub(r"(https?://[^\s?]+)\?[^\s,)]*", r"\1", text))


def warn(text: str) -> None:
    """One line on standard error, from the first process of several."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def parse(settings: type, description: str):
    """The settings dataclass from the command line by tyro, its attribute given the names of the flags there; what tyro says
    of a bad flag, in a box of several lines, becomes one line. Exit code 2 then."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            s = tyro.cli(settings, description=description)
        s.given = {word[2:].partition("=")[0].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
        return s
    except SystemExit:
        if said.getvalue():
            # Without bold type, the frame with its heading, and the help that follows.
            text = re.sub(r"\x1b\[[\d;]*m|\[/?bold\]", "", said.getvalue())
            text = re.sub(r"\u256d.*\u256e|[\u2500-\u257f]|-{5,}", " ", text)
            print("error:", " ".join(text.split()).partition(" Argument helptext:")[0], file=sys.stderr)
        raise


def answer(settings: type, module: str, description: str) -> None:
    """Parse the command line of the script that runs, for what ends there: --help and what is wrong with a flag. The imports
    that follow make no garbage: they go faster if none is looked for, and run() keeps out of what they leave."""
    if module == "__main__":
        parse(settings, description)
        gc.disable()


def run(main, settings: type, description: str, again: str = "the same command goes on") -> None:
    """A script from its command line to its exit code: main(settings). again: how a stopped run is continued. Exit codes: 2
    for a UserError or a disk that cannot be written to, 130 for Ctrl-C, 128 + n for a signal n, 1 otherwise."""
    for stream in (sys.stdout, sys.stderr):
        # A folder's name may hold letters that the terminal does not.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    s = parse(settings, description)
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    try:
        main(s)
    except UserError as e:
        end(f"error: {e}", e.code)
    except Stopped as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped; what is finished is kept, {again}", file=sys.stderr)
        sys.exit(128 + e.args[0])
    except KeyboardInterrupt:
        end(f"stopped; what is finished is kept, {again}", 130)
    except BrokenPipeError:
        # Whoever read the output has gone; what Python would say of that at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    except Exception as e:
        if isinstance(e, OSError) and e.errno in REPAIRABLE:
            place = e.filename or getattr(s, "output_dir", "the disk")
            end(f"error: {place}: {e.strerror}; what is finished is kept, put that right and {again}", 2)
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        end(traceback.format_exc(), 1)


def end(message: str, code: int) -> None:
    """Print the last line and exit. One process of several must not wait for the others to end in order, as these may be
    waiting for it; and what all of them found out is said by the first, which has ended the others before they speak."""
    if rank := int(os.environ.get("RANK", 0)):
        time.sleep(10)
        message = f"[process {rank}] {message}"
    print(message, file=sys.stderr, flush=True)
    leave(code)


def leave(code: int) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
