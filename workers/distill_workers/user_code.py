"""The user's code, in processes of its own: to exit, abort, hang or raise there ends no trainer."""

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from typing import Any, Protocol

from distill_workers.failures import ConfigurationError
from distill_workers.isolated_process import START_SECONDS, call, end, is_alive, new_process

CHECK_SECONDS = 10.0
"""The longest time that a job waits, before it begins, to hear whether the code can be called."""
IMPORT_SECONDS = 30.0
"""The longest time that the code's module may take to load, or the timeout of a call where that is longer."""


class UserCodeFailed(Exception):
    """Raised when a call comes to no result: it took too long, or ended its process."""

    def __init__(self, message: str, *, permanent: bool = True) -> None:
        super().__init__(message)
        self.permanent = permanent
        """Whether the same call would fail again; not where its process could not be started this time."""


class NotCallable(Exception):
    """Raised where the user's code cannot be called; the message is the end of a sentence that begins with its name."""


class UserCode(Protocol):
    """A piece of code by its name `module:attribute`."""

    @property
    def name(self) -> str: ...

    def inspect(self) -> str:
        """Load the code, in its own process, and return what keeps it from being called; empty where nothing does.

        May raise NotCallable, and whatever else the code raises as it is loaded.
        """


def prepare(code: UserCode) -> str:
    """Return what keeps the code from being called, whatever it does as it is loaded; empty where nothing does."""
    try:
        return code.inspect()
    except NotCallable as error:
        return str(error)
    except BaseException as error:
        return described(error)


def load(name: str) -> Any:
    """Return `module:attribute`, imported in this process. Raises NotCallable."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise NotCallable(
            f"{error}; put the module on PYTHONPATH: in trainer.template for main, or for distill run in the "
            "environment"
        ) from None
    except BaseException as error:
        raise NotCallable(f"its module {module} raised {described(error)} while it was imported") from None


def described(error: BaseException) -> str:
    """Return type and text of what was raised, in at most 1,000 characters."""
    try:
        text = str(error)
    except BaseException:  # it is the user's
        text = "it has no text"
    return f"{type(error).__name__}: {text}"[:1000]


class UserProcess:
    """A process that has loaded the user's code and does nothing else, held by one caller."""

    def __init__(self, worker: ProcessPoolExecutor, subject: str, timeout_seconds: float) -> None:
        self._worker, self._subject, self._timeout = worker, subject, timeout_seconds
        self.ended = False

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what the function returns in the process. A call that takes too long, or is cancelled, ends it.

        Raises UserCodeFailed, and what the function raises.
        """
        try:
            return await call(self._worker, self._timeout, function, *arguments)
        except TimeoutError:
            self._end()
            raise UserCodeFailed(f"{self._subject} took longer than {self._timeout:g} s") from None
        except BrokenProcessPool:
            self._end()
            raise UserCodeFailed(f"{self._subject}'s process died") from None
        except Exception:
            raise
        except BaseException:
            self._end()  # it is still at work
            raise

    def _end(self) -> None:
        end(self._worker)
        self.ended = True


class UserProcesses:
    """The processes of one piece of the user's code. Each has one caller at a time, so what hangs takes no other
    call with it."""

    def __init__(self, code: UserCode, *, setting: str, subject: str, timeout_seconds: float, processes: int) -> None:
        """`setting` is the field of the job that names the code, `subject` what sentences call it: "the reward"."""
        self._code, self._subject, self._timeout = code, subject, timeout_seconds
        self._title = f"{setting} {code.name}"
        self._module = code.name.partition(":")[0]
        self._has_loaded = False
        """Whether some process could load the code: then it is no fault of the job if another cannot."""
        # The last one used is taken first; None has yet to be started.
        self._idle: asyncio.LifoQueue[ProcessPoolExecutor | None] = asyncio.LifoQueue()
        for _ in range(processes):
            self._idle.put_nowait(None)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[UserProcess]:
        """Hold one of the processes, once one is free. Raises UserCodeFailed, ConfigurationError."""
        worker = await self._idle.get()
        if worker is not None and not is_alive(worker):
            end(worker)
            worker = None
        try:
            worker = worker or await self._start()
            held = UserProcess(worker, self._subject, self._timeout)
            try:
                yield held
            finally:
                worker = None if held.ended else worker
        finally:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        for _ in range(self._idle.qsize()):
            end(self._idle.get_nowait())

    def check(self) -> None:
        """Raises ConfigurationError for code that cannot be called. Code that loads slowly is left to its samples.

        It is loaded in a process of its own: to import it here would let it end, or hang, the trainer.
        """
        worker = new_process()
        kept = False
        try:
            worker.submit(int).result(START_SECONDS)
            self._refuse(worker.submit(prepare, self._code).result(CHECK_SECONDS))
            kept = True
        except TimeoutError:
            return
        except BrokenProcessPool:
            raise ConfigurationError(
                f"{self._title}: its module {self._module} ended the process while it was imported"
            ) from None
        finally:
            if kept:
                self._idle.get_nowait()
                self._idle.put_nowait(worker)
            else:
                end(worker)

    async def _start(self) -> ProcessPoolExecutor:
        limit = max(IMPORT_SECONDS, self._timeout)
        try:
            made = new_process()
        except OSError as error:
            raise UserCodeFailed(f"no process could be started for {self._subject}: {error}", permanent=False) from None
        try:
            # A new process loads modules first; that is no time of the code's.
            await call(made, START_SECONDS, int)
            self._refuse(await call(made, limit, prepare, self._code))
        except TimeoutError:
            end(made)
            raise UserCodeFailed(
                f"{self._subject}'s module {self._module} took longer than {limit:g} s to load"
            ) from None
        except BrokenProcessPool:
            end(made)
            raise UserCodeFailed(
                f"{self._subject}'s process died while it loaded the module {self._module}", permanent=False
            ) from None
        except BaseException:
            end(made)
            raise
        return made

    def _refuse(self, wrong: str) -> None:
        if wrong and self._has_loaded:
            raise UserCodeFailed(f"{self._title}: {wrong}", permanent=False)
        if wrong:
            raise ConfigurationError(f"{self._title}: {wrong}")
        self._has_loaded = True
