"""Command lines run in forks of one process that has imported everything: a start costs little.

As a script it is that process: it reads one JSON list a line, forks, and writes the fork's process
id; for the word "wait" and an id it writes the exit status. Nothing is computed in it, so no thread
is there when it forks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


class Warm:
    """The process of forks, used as a context manager."""

    def __enter__(self) -> Warm:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def _ask(self, *words: object) -> int:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, log: Path, *argv: object) -> int:
        """Begins `fastalign ARGV`, its output appended to `log`; the process id."""
        return self._ask("run", log, *argv)

    def wait(self, pid: int) -> int:
        """The exit status, minus the signal's number for one that was killed."""
        return self._ask("wait", pid)

    def run(self, log: Path, *argv: object) -> None:
        """From beginning to end."""
        status = self.wait(self.start(log, *argv))
        assert status == 0, log.read_text()


def child(log: str, argv: list[str]) -> None:
    """Never returns."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    status = 1
    try:
        from fastalign.cli import main

        main(argv)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    from importlib import import_module

    from transformers import LlamaForCausalLM, LlamaModel  # noqa: F401, loaded when first named

    from fastalign.cli import COMMANDS

    for module, _, _ in COMMANDS.values():
        import_module(module)
    import fastalign.report.plots  # noqa: F401

    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        word, first, *rest = json.loads(line)
        if word == "run":
            pid = os.fork()
            if pid == 0:
                child(first, rest)
            print(pid, file=replies, flush=True)
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(int(first), 0)[1])
            print(status, file=replies, flush=True)


if __name__ == "__main__":
    serve()
