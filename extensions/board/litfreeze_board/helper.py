"""The process beside the server that does what is heavy, so that the page never waits for it: it opens checkpoints,
counts, ranks and answers. One call at a time; both sides speak in lines of JSON.

It ends with the server, however that ends: then nobody holds the other end of its input."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any, Optional

from litfreeze.errors import LitfreezeError, RunError, UsageError
from litfreeze_board.runs import environment

CALLS = {
    "plan": "litfreeze_board.plan:plan",
    "rank": "litfreeze_board.plan:rank",
    "set_rate": "litfreeze_board.plan:set_rate",
    "answer": "litfreeze_board.answer:answer",
}
ENDED = "The process that was asked has ended, perhaps for want of memory. Try it again."
LINE = 2**26  # bytes of the longest line


class Helper:
    """One such process, started when it is first needed, in the folder `root`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.process: Optional[asyncio.subprocess.Process] = None
        self.turn = asyncio.Lock()

    async def call(self, name: str, **arguments: Any) -> Any:
        """What the function `name` of `CALLS` returns. Raises UsageError or RunError as it does."""
        result = None
        async for kind, value in self.lines(name, **arguments):
            result = value if kind == "done" else result
        return result

    async def lines(self, name: str, **arguments: Any) -> AsyncIterator[tuple[str, Any]]:
        """("piece", …) for each that the function yields, and ("done", result) at the end."""
        async with self.turn:
            process = await self._running()
            whole = False
            try:
                process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
                await process.stdin.drain()
                while line := await process.stdout.readline():
                    kind, value = json.loads(line)
                    if kind == "refused":
                        whole = True
                        raise UsageError(value)
                    if kind == "failed":
                        whole = True
                        raise RunError(value)
                    whole = kind == "done"
                    yield kind, value
                    if whole:
                        return
                raise RunError(ENDED)
            except (BrokenPipeError, ConnectionResetError):
                raise RunError(ENDED) from None
            finally:
                if not whole:  # the rest of its answer would be taken for that to the next question
                    self.end()

    async def _running(self) -> asyncio.subprocess.Process:
        if self.process is None or self.process.returncode is not None:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "litfreeze_board.helper"),
                cwd=self.root,
                env=environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE,
                start_new_session=True,  # a Ctrl-C is for the server, which takes leave of it
            )
        return self.process

    def end(self) -> None:
        """Ends the process, and with it whatever it is doing."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        self.process = None


def serve() -> None:
    """Answers the calls that come on standard input, until it ends. What a function prints goes to standard error."""
    from litfreeze.cli import load

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(kind: str, value: Any) -> None:
        out.write(json.dumps([kind, value]) + "\n")
        out.flush()

    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            result = load(CALLS[name])(**arguments)
            if hasattr(result, "__next__"):
                for piece in result:
                    say("piece", piece)
                result = None
            say("done", result)
        except LitfreezeError as error:
            say("refused", str(error))
        except Exception as error:
            say("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


if __name__ == "__main__":
    serve()
