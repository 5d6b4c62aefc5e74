"""Two processes of one benchmark that take turns, so that a noisy machine is noisy for both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

# glibc gives every block above 32 MiB back and gets it zeroed again: 10 % of a dense step, 20 % of
# a shared one, whose blocks pass that size first. Neither side is to be measured by it.
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**34))


class Side:
    """`python -m MODULE <the same arguments> --side NAME --out OUT`, asked a word a line."""

    def __init__(self, module: str, name: str, out: str) -> None:
        command = [sys.executable, "-m", module, *sys.argv[1:], "--side", name, "--out", out]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | KEEP_MEMORY,
        )  # fmt: skip

    def ask(self, word: str) -> dict[str, Any]:
        """The JSON object that the side answers with; other lines are passed over.

        Raises:
            RuntimeError: the process ended.
        """
        assert self.process.stdin and self.process.stdout
        print(word, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"benchmark process ended with {self.process.wait()}")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
