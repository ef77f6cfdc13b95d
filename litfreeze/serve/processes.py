"""The processes of `litfreeze serve`: they start together, and end together.

LitServe brings them, the queue between them and HTTP; here they are watched."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from multiprocessing.process import BaseProcess
from socket import socket
from types import FrameType
from typing import Any, Optional

import litserve
from fastapi import FastAPI
from litserve.utils import WorkerSetupStatus
from starlette.exceptions import HTTPException

from litfreeze.errors import Interrupted, RunError
from litfreeze.serve.completions import Refused
from litfreeze.serve.http import in_form
from litfreeze.serve.parent import leave_with_parent
from litfreeze.serve.worker import Answers


class Server(litserve.LitServer):
    """The processes, and the first line once they are ready."""

    def __init__(self, answers: Answers, greeting: str) -> None:
        # The model's process chooses the device itself; a request may wait for the ones before it as long as it takes
        super().__init__(answers, accelerator="cpu", devices=1, timeout=False, disable_openapi_url=True)
        self.greeting = greeting
        self.uvicorn_graceful_timeout = 1
        for kind in (Refused, HTTPException, Exception):
            self.app.add_exception_handler(kind, in_form)

    def launch_inference_worker(self, lit_api: litserve.LitAPI) -> list[BaseProcess]:
        """LitServe's, deaf to Ctrl-C, which a terminal sends to all: the first process ends the others."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return super().launch_inference_worker(lit_api)
        finally:
            signal.signal(signal.SIGINT, before)

    def verify_worker_status(self) -> None:
        """Waits for the model. LitServe would wait for one that was killed, too."""
        while WorkerSetupStatus.READY not in self.workers_setup_status.values():
            if not all(worker.is_alive() for worker in self.inference_workers):
                raise RunError("The model could not be loaded; what stands above says why.")
            time.sleep(0.05)

    def _start_server(
        self, port: int, servers: int, log_level: str, sockets: list[socket], *args: Any, **kw: Any
    ) -> Any:
        for each in sockets:
            each.listen()  # who comes before the process does is kept waiting, and not refused
        started = super()._start_server(port, servers, log_level, sockets, *args, **kw)
        threading.Thread(target=self._watch, args=(started[0],), daemon=True).start()
        print(self.greeting, flush=True)
        return started

    def _watch(self, http: BaseProcess) -> None:
        """Ends everything when the process that speaks HTTP is lost; LitServe looks after the model's alone."""
        http.join()
        with suppress(EOFError, OSError):  # it was all ending anyway
            self._shutdown_event.set()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """What happens around the service of the process that speaks HTTP."""
        leave_with_parent()
        async with super().lifespan(app):
            yield

    def serve(self, host: str, port: int) -> None:
        """Until a signal ends it, which is an Interrupted, or one of its processes is lost, which is a RunError."""
        first, signals = os.getpid(), []

        def stop(number: int, _: Optional[FrameType]) -> None:
            if os.getpid() != first:  # uvicorn's process: it raises again what it was ended by
                os._exit(0)
            signals.append(number)
            raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        reason = "The server has lost a process; what stands above says why."
        try:
            self.run(host, port, num_api_servers=1, log_level="error", generate_client_file=False)
        except SystemExit:  # uvicorn's, where somebody was faster
            reason = f"The server cannot have port {port} of {host}."
        except (KeyboardInterrupt, EOFError, OSError):  # the last two from LitServe's queues, when a process is lost
            pass
        finally:
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
            for number, handler in before.items():
                signal.signal(number, handler)
        if signals:
            raise Interrupted(signals[0])
        raise RunError(reason)
