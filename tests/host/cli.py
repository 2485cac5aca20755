"""Running `pyhv` as a process, as a user or a script would, with or without a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time
from types import TracebackType
from typing import Any

import pytest

from pyhv.cli import main

TIMEOUT = 60  # seconds; everything here takes well under one, on a machine with nothing else to do

COMMAND = [sys.executable, "-m", "pyhv"]

# For what starts processes: Python takes 1 s to start on an emulated AMD host and 7 s on an Intel one.
IN_THE_LAB = "PYHV_LAB_KIND" in os.environ
LAB_REASON = "starts too many processes for an emulated host; runs outside it"
NOT_IN_THE_LAB = pytest.mark.skipif(IN_THE_LAB, reason=LAB_REASON)


def call(*words: str, stdin: Any = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    """Runs `pyhv WORDS` to its end."""
    return subprocess.run(
        [*COMMAND, *words], stdin=stdin, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment()
    )


def call_json(*words: str) -> Any:
    """Runs `pyhv WORDS --json`; what it printed, with its exit status as "exit"."""
    done = call(*words, "--json")
    return json.loads(done.stdout) | {"exit": done.returncode}


def call_here(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Runs `pyhv WORDS` in this process: its status, stdout and stderr. Quick enough for an emulated host."""
    status = main(list(words))
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYHV_DEBUG"}


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own; `main` is pyhv's main, `words` are sys.argv[1:]."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom pyhv.cli import main\n{code}", *words],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment(),
    )  # fmt: skip


# Polls for input until a q, and prints how much came and its sum: sixteen digits A to P, the lowest first.
SUMS = bytes.fromhex(
    "31db 31c9"  #          xor ebx, ebx; xor ecx, ecx
    "66bafd03"  #     next: mov dx, 0x3fd
    "ec a801 74fb"  # wait: in al, dx; test al, 1; jz wait
    "b2f8 ec 0fb6c0"  #     mov dl, 0xf8; in al, dx; movzx eax, al
    "ffc1 6bdb1f 01c3"  #   inc ecx; imul ebx, ebx, 31; add ebx, eax
    "3c71 75e6"  #          cmp al, 'q'; jne next
    "48c1e320 4809cb"  #    shl rbx, 32; or rbx, rcx
    "b110"  #               mov cl, 16
    "88d8 240f 0441 ee"  # digit: mov al, bl; and al, 15; add al, 'A'; out dx, al
    "48c1eb04 fec9 75f1"  # shr rbx, 4; dec cl; jnz digit
    "88c8 e6f4 f4"  #       mov al, cl; out 0xf4, al; hlt
)


def summed(text: bytes) -> bytes:
    """What the guest that sums prints of it."""
    value = 0
    for byte in text:
        value = value * 31 + byte & 0xFFFFFFFF
    value = value << 32 | len(text)
    return bytes(ord("A") + (value >> 4 * n & 15) for n in range(16))


# More than a pipe and a guest's FIFO hold together, and no byte that a terminal or a guest acts on before the end.
LONG = bytes(ord("a") + n % 16 for n in range(100_000)) + b"q"


class Terminal:
    """A process on a terminal of its own, in the terminal's foreground.

    settings_before: the terminal's settings before it started, as an ordinary terminal has them.
    """

    def __init__(self, *words: str, command: list[str] | None = None) -> None:
        self.master, self._slave = os.openpty()
        self.settings_before = termios.tcgetattr(self._slave)
        assert self.settings_before[3] & termios.ICANON and self.settings_before[3] & termios.ECHO
        self.output = b""
        self.process = subprocess.Popen(
            [*(command or COMMAND), *words],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.master)
        os.close(self._slave)

    @property
    def settings(self) -> list[Any]:
        """The terminal's settings now."""
        return termios.tcgetattr(self._slave)

    @property
    def raw(self) -> bool:
        return not self.settings[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def change(self, settings: list[Any]) -> None:
        termios.tcsetattr(self._slave, termios.TCSANOW, settings)

    def send(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def paste(self, text: bytes) -> None:
        """Sends much at once, and reads what comes meanwhile."""
        os.set_blocking(self.master, False)
        try:
            while text:
                readable, writable, _ = select.select([self.master], [self.master], [], TIMEOUT)
                assert readable or writable, self.output
                if readable:
                    self._read(0)
                if writable:
                    with contextlib.suppress(BlockingIOError):
                        text = text[os.write(self.master, text[:65536]) :]
        finally:
            os.set_blocking(self.master, True)

    def read_until(self, text: bytes) -> bytes:
        """Reads until `text` has been seen since the last call; what was read."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), f"waited for {text!r}, got {self.output!r}"
        end = self.output.index(text) + len(text)
        found, self.output = self.output[:end], self.output[end:]
        return found

    def wait_until_raw(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not self.raw:
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.002)

    def wait(self) -> int:
        """Reads until the process has ended; its status."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.output
            self._read(0.02)
        while self._read(0):
            pass
        return self.process.returncode

    def _read(self, timeout: float) -> bool:
        if not select.select([self.master], [], [], timeout)[0]:
            return False
        self.output += os.read(self.master, 65536)
        return True
