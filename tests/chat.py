"""Plays a user at a terminal: chat.py COMMAND... Used by tests/cli.rs."""

import os
import pty
import re
import select
import signal
import sys
import time

DEADLINE = time.monotonic() + 120

pid, terminal = pty.fork()
if pid == 0:
    os.environ["TERM"] = "xterm"
    os.environ.pop("NO_COLOR", None)
    os.execv(sys.argv[1], sys.argv[1:])

seen = ""


def wait_for(pattern):
    """Reads until `pattern` has come; returns what came with it."""
    global seen
    while not re.search(pattern, seen):
        if not select.select([terminal], [], [], max(0, DEADLINE - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            sys.exit(f"waited in vain for {pattern!r}: {seen!r}")
        try:
            seen += os.read(terminal, 4096).decode(errors="replace")
        except OSError:
            sys.exit(f"ended before {pattern!r}: {seen!r}")
    end = re.search(pattern, seen).end()
    text, seen = seen[:end], seen[end:]
    return text


def type_in(text):
    os.write(terminal, text.encode())


QUESTION = "Find x with 7x + 4 = 1 (mod 11)."
PROMPT = r"> (\r?\x1b\[[0-9;?]*[a-zA-Z])*$"

wait_for(PROMPT)
type_in(QUESTION + "\r")
wait_for("try ")
type_in("\x03")
wait_for("finish: cancelled")
wait_for(PROMPT)

type_in("/budget 8 0\r")
wait_for("at most 8 thinking tokens")
wait_for(PROMPT)
type_in(QUESTION + "\r")
answer = wait_for("finish: stop")
assert "\x1b[2m" in answer, f"thinking is dim: {answer!r}"
assert re.search(r"\x1b\[33m[^\x1b]*Final", answer), f"what is forced is coloured: {answer!r}"
assert "8 thinking tokens, 0 ends ignored, maximum hit" in answer, answer
wait_for(PROMPT)

type_in("\x03")
wait_for(PROMPT)
type_in("\x04")
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
