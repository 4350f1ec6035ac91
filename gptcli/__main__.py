"""``gptcli`` and ``python -m gptcli`` (what torchrun launches)."""

import gc
import os
import sys
from typing import NoReturn

INTERRUPTED = 130  # as in errors.py, which is not imported yet when Ctrl-C comes


def run() -> NoReturn:
    """The console script. Nothing is imported before Ctrl-C is quiet."""
    try:
        gc.disable()  # what is imported stays: looking for garbage in it again and again is a tenth of the start
        from gptcli.cli import main

        gc.freeze()
        gc.enable()
        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    end(code)


def end(code: int) -> NoReturn:
    """End the process; one that has loaded torch, or is about to on another thread, at once.

    After Ctrl-C on a terminal the process dies of it, as other programs do: only so does a loop in the shell end with
    what it runs. Whoever asks the shell is told 130 all the same.

    Taking the interpreter down means taking hundreds of thousands of objects apart one by one, up to half a second for
    memory that the system takes back anyway. And of a rank of several, gloo's threads let go of a finished collective's
    tensors when they come to it, and need the interpreter for that: where they find it being taken down, the C++
    runtime aborts the whole process, after all has gone well.
    """
    threading = sys.modules.get("threading")
    interrupted = code == INTERRUPTED and sys.stderr is not None and sys.stderr.isatty()
    if interrupted or "torch" in sys.modules or (threading and threading.active_count() > 1):
        import atexit

        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except (OSError, ValueError):  # closed, or nobody reads it
                code = code or 1
        if interrupted:
            import signal

            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
