"""The process that owns the sockets: starts generations, lets the ready one take over, ends the old ones.

One thread, one loop. What may block: fork until exec, and reading /proc while a generation becomes ready.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from ..errors import ConfigurationError, GenerationFailed, OperationAborted, PortwayError
from .config import Options
from .control import Control, Request
from .generation import Generation, Phase, same_sockets
from .limits import watch_limits
from .listeners import Group
from .loop import Loop, Timer
from .notify import Notifier
from .output import Tail, last_lines
from .paths import Lock, listen_at
from .plan import Plan
from .report import report, snapshot
from .retire import Retire, sweep
from .state import remove_state, write_state
from .worker import Worker

__all__ = ["Supervisor"]

_TICK = 0.05  # seconds between two looks at a generation that is not ready yet
_BACKOFF = (0.1, 30.0, 60.0)  # first, longest, and how long a process must live to be forgiven; seconds


class Supervisor:
    """Owns everything of one service. `run` returns the exit code; `close` gives back what is left."""

    def __init__(self, plan: Plan, options: Options, folder: str, lock: Lock) -> None:
        self.plan = plan
        self.options = options
        self.folder = folder
        self.lock = lock
        self.loop = Loop()
        self.tail = Tail(self.loop, folder) if options.output == "tail" else None
        self.notifier = Notifier(self.loop)
        self.control: Control | None = None
        self.groups: list[Group] = []
        self.generations: list[Generation] = []
        self.retiring: dict[int, Retire] = {}
        self.serving: Generation | None = None
        self.rising: Generation | None = None
        self.number = 0
        self.waiters: list[Request] = []
        self.queued: tuple[list[Request], list[str] | None] | None = None
        self.stoppers: list[Request] = []
        self.stopping = False
        self.failure: PortwayError | None = None
        self.reloads = 0
        self.quiet_until = 0.0  # monotonic; a replacement by age or size that failed is not tried again before
        self._before = plan.given  # what to go back to when a reload fails
        self._restarts: dict[tuple[int, int], Timer] = {}
        self.hooks: dict[str, Callable[[Request], None]] = {}

    # -- life

    def say(self, text: str, *, tell: bool = True) -> None:
        """A remark: to stderr, and (`tell`) to every command that waits for this reload."""
        try:
            print(f"portway: {self.options.name}: {text}", file=sys.stderr, flush=True)
        except OSError:
            pass  # our stderr is gone; the service goes on
        for request in [*self.waiters, *self.stoppers] if tell else ():
            request.event(text)

    def listen(self) -> None:
        self.control = Control(self.loop, listen_at(os.path.join(self.folder, "control")), self.serve)

    def signals(self) -> None:
        self.loop.on_signal(signal.SIGCHLD, self.reap)
        self.loop.on_signal(signal.SIGHUP, lambda: None if self.stopping else self.reload(None))
        self.loop.on_signal(signal.SIGTERM, lambda: self.stop(None))
        self.loop.on_signal(signal.SIGINT, lambda: self.stop(None))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def first(self) -> None:
        """Start the first generation; its failure ends `run`. After a take-over it is the next one, and does not."""
        if self.serving is None:
            self._begin(self.options)
        else:
            self.reload(None)

    def run(self) -> int:
        """Until the service has stopped. Raises what made the first generation fail."""
        watch_limits(self)
        self.loop.run()
        if self.failure is not None:
            raise self.failure
        return 0

    def close(self, *, keep: bool = False) -> None:
        """After `run`, or instead of it. With `keep`, orphans and what they serve stay for a later supervisor."""
        for generation in list(self.generations):
            mine = [worker for worker in generation.alive if not worker.orphan]
            for worker in mine:
                worker.signal(signal.SIGKILL, group=True)
            if mine or not keep:
                generation.close(self.loop)
                self.generations.remove(generation)
        if keep and self.generations:
            self.save()
        for group in self.groups:
            group.abandon() if keep else group.close()
        if self.control is not None:
            self.control.close()
        if self.tail is not None:
            self.tail.flush()
            self.tail.close()
        self.loop.close()

    # -- a generation comes

    def _begin(self, options: Options) -> None:
        self.number += 1
        generation = Generation(self.number, options, self.groups)
        generation.open(self.loop, self.tail)
        self.rising = generation
        self.generations.append(generation)
        for worker in generation.workers:
            worker.on_change = self.on_worker
        self.save()
        pids = ", ".join(str(worker.pid) for worker in generation.workers)
        self.say(f"generation {generation.number} started (pid {pids})")
        self.loop.after(0.0, lambda: self._look(generation))

    def _look(self, generation: Generation) -> None:
        """Is it ready yet? Every tick until it is, or has failed."""
        if generation is not self.rising:
            return
        now = time.monotonic()
        if generation.phase is Phase.STARTING:
            missing = generation.waiting_for()
            if missing is None:
                generation.phase = Phase.HOLDING
                generation.served = now + generation.options.ready_hold
            elif now > generation.began + generation.options.ready_timeout:
                self._fail(generation, f"not ready within {generation.options.ready_timeout:g} s: {missing}")
                return
        if generation.phase is Phase.HOLDING and now >= generation.served:
            self._take_over(generation)
            return
        # Reading /proc for a large tree takes a while: look less often then, not all the time.
        self.loop.after(max(_TICK, 4 * (time.monotonic() - now)), lambda: self._look(generation))

    def _take_over(self, generation: Generation) -> None:
        old, self.serving, self.rising = self.serving, generation, None
        if generation.probe is not None:
            generation.probe.close()
        for group, listener in zip(generation.groups, generation.listeners, strict=True):
            group.promote(listener)
        generation.phase = Phase.SERVING
        generation.served = time.monotonic()
        for worker in generation.workers:
            worker.last_beat = generation.served  # the time to start is no missed beat
        self.options = generation.options
        self.say(f"generation {generation.number} serves" + (f"; generation {old.number} drains" if old else ""))
        for previous in [one for one in self.generations if one.phase is Phase.SERVING and one is not generation]:
            self._retire(previous, generation)
        self.save()
        self.notifier.ready(f"Generation {generation.number} serves")
        self._answer(lambda request: request.done(generation=generation.number, pids=[w.pid for w in generation.alive]))

    def _fail(self, generation: Generation, why: str) -> None:
        """It never took over; what served goes on serving."""
        generation.phase, generation.why, self.rising = Phase.FAILED, why, None
        if self.tail is not None:
            self.tail.flush()
        lines = last_lines(self.folder, generation.number) if self.tail is not None else []
        error = generation.failure(lines)
        self.plan.given = self._before  # a broken command is not tried again
        self.say(f"generation {generation.number} did not take over: {why}", tell=False)
        for worker in generation.alive:
            worker.signal(signal.SIGKILL, group=True)
        self.ended_if_empty(generation)
        if self.serving is not None:
            self.notifier.ready(f"Generation {self.serving.number} serves; {generation.number} failed")
        self._answer(lambda request: request.fail(error))
        if self.serving is None and not self.stopping:
            self.failure = error
            self._end()

    def _answer(self, answer: Callable[[Request], None]) -> None:
        """The reload is over, one way or the other: tell who waited, begin the one that queued up meanwhile."""
        waiters, self.waiters = self.waiters, []
        for request in waiters:
            answer(request)
        if self.queued is not None and not self.stopping:
            requests, command = self.queued
            self.queued = None
            self._reload(requests, command)

    # -- a generation goes

    def _retire(self, old: Generation, successor: Generation | None) -> None:
        for key in [key for key in self._restarts if key[0] == old.number]:
            self._restarts.pop(key).cancel()
        for timer in old.timers:
            timer.cancel()
        source = successor.options if successor is not None else old.options
        retire = Retire(self.loop, old, successor, settle=source.settle, limit=source.drain, say=self.say)
        self.retiring[old.number] = retire
        if successor is not None:
            for other in self.retiring.values():
                if other is not retire:
                    other.redirect(successor)
        retire.begin()
        self.ended_if_empty(old)

    def ended_if_empty(self, generation: Generation) -> None:
        if generation.alive or generation.phase in (Phase.STARTING, Phase.HOLDING, Phase.SERVING, Phase.ENDED):
            return
        if generation not in self.generations:
            return
        failed = generation.phase is Phase.FAILED
        generation.phase = Phase.ENDED
        generation.close(self.loop)
        self.generations.remove(generation)
        self.retiring.pop(generation.number, None)
        if self.tail is not None:
            self.tail.forget(generation.number)
        if not failed:
            self.say(f"generation {generation.number} ended")
        self.save()
        if self.stopping and not self.generations:
            self._end()

    def _end(self) -> None:
        # Closed when this process ends, and not before: `portway stop` returns when there is nothing left.
        self._last_words = [request.sock.dup() for request in self.stoppers if request.sock.fileno() >= 0]
        for request in self.stoppers:
            request.done(stopped=True)
        self.loop.stop()

    # -- processes

    def reap(self) -> None:
        """Every child that has ended, ours or (as PID 1) not."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for generation in list(self.generations):
                for worker in generation.workers:
                    if worker.pid == pid:
                        self.on_exit(generation, worker, os.waitstatus_to_exitcode(status))

    def watch_orphan(self, generation: Generation, worker: Worker) -> None:
        """Not our child: its pidfd tells when it has ended."""
        if worker.pidfd is None:
            return
        self.loop.watch(worker.pidfd, lambda: self.on_exit(generation, worker, None))

    def on_exit(self, generation: Generation, worker: Worker, code: int | None) -> None:
        leader = worker.pid
        if worker.pidfd is not None:
            self.loop.forget(worker.pidfd)
        worker.ended()
        if not worker.killed:
            sweep(self.loop, leader, force=generation.options.drain is not None)
        how = _how(code)
        if generation.phase in (Phase.STARTING, Phase.HOLDING):
            self._fail(generation, f"worker {worker.index} (pid {leader}) {how} before it took over")
        elif generation.phase is Phase.SERVING:
            self._restart_later(generation, worker, leader, how)
        else:
            if not worker.ordered:
                who = f"generation {generation.number}: worker {worker.index} (pid {leader})"
                self.say(f"{who} {how} while {generation.phase}")
            self.ended_if_empty(generation)

    def _restart_later(self, generation: Generation, worker: Worker, pid: int, how: str) -> None:
        first, longest, forgiven = _BACKOFF
        if time.monotonic() - worker.since > forgiven:
            worker.backoff = first
        wait, worker.backoff = worker.backoff, min(longest, worker.backoff * 2)
        worker.orphan = False  # the next one is our child
        self.say(f"generation {generation.number}: worker {worker.index} (pid {pid}) {how}; again in {wait:g} s")
        timer = self.loop.after(wait, lambda: self._restart(generation, worker))
        self._restarts[(generation.number, worker.index)] = timer
        self.save()

    def restart_missing(self, generation: Generation) -> None:
        """Workers whose back-off was running when the supervisor replaced itself."""
        for worker in generation.workers:
            if generation.phase is Phase.SERVING and not worker.alive:
                self._restart(generation, worker)

    def _restart(self, generation: Generation, worker: Worker) -> None:
        if generation.phase is not Phase.SERVING or worker.alive or len(generation.listeners) != len(self.groups):
            return
        worker.restarts += 1
        try:
            generation.start(worker, self.loop, self.tail)
        except (PortwayError, OSError) as error:
            worker.since = time.monotonic()
            self._restart_later(generation, worker, 0, f"did not start ({error})")
            return
        self.say(f"generation {generation.number}: worker {worker.index} started again (pid {worker.pid})")
        self.save()

    def on_worker(self, worker: Worker) -> None:
        """It said something."""
        known = (worker.hook, worker.adopts, worker.drained)
        if known != worker.saved:
            worker.saved = known
            self.save()  # a later supervisor must know how to end it
        retire = self.retiring.get(worker.generation)
        if worker.drained and retire is not None and retire.old.phase in (Phase.DRAINING, Phase.STOPPING):
            worker.on_change = lambda worker: None
            retire.on_drained(worker)

    # -- commands

    def serve(self, request: Request) -> None:
        verbs = {"status": self._status, "reload": self._on_reload, "stop": self._on_stop, **self.hooks}
        verb = verbs.get(request.verb)
        if verb is None:
            request.fail(PortwayError(f"no such verb {request.verb!r}", hint=f"verbs are {', '.join(verbs)}"))
            return
        try:
            verb(request)
        except PortwayError as error:
            request.fail(error)

    def _status(self, request: Request) -> None:
        request.done(**report(self))

    def _on_reload(self, request: Request) -> None:
        command = request.message.get("command")
        if command is not None and not (isinstance(command, list) and all(isinstance(one, str) for one in command)):
            raise ConfigurationError(f"command={command!r}: must be a list of texts")
        self.reload(request, command or None)

    def reload(self, request: Request | None, command: list[str] | None = None) -> None:
        """Start the next generation; while one is starting, all that ask meanwhile share the one after it."""
        if self.stopping:
            raise OperationAborted(f"{self.options.name} is stopping")
        requests = [] if request is None else [request]
        if self.rising is None:
            self._reload(requests, command)
            return
        waiting, before = self.queued or ([], None)
        self.queued = ([*waiting, *requests], command or before)
        for one in requests:
            one.event(f"generation {self.rising.number} is starting; the next one follows it")

    def _reload(self, requests: list[Request], command: list[str] | None) -> None:
        self.waiters = requests
        self.reloads += 1
        self._before = dict(self.plan.given)
        try:
            if command:
                self.plan.given = self._before | {"command": command}
            options = self.plan.read()
            if not same_sockets(options, self.options) or options.output != self.options.output:
                raise ConfigurationError(
                    "bind and output cannot change while the service runs",
                    hint=f"`portway stop {options.name}` and run it again",
                )
            self.notifier.reloading()
            self._begin(options)
        except (PortwayError, OSError) as error:
            self.plan.given = self._before
            failed = error if isinstance(error, PortwayError) else GenerationFailed(f"{self.options.name}: {error}")
            self.say(f"not reloaded: {failed}", tell=False)
            if self.serving is not None:
                self.notifier.ready(f"Generation {self.serving.number} serves; the reload failed")
            self._answer(lambda request: request.fail(failed))

    def _on_stop(self, request: Request) -> None:
        self.stop(request, now=request.message.get("now") is True)

    def stop(self, request: Request | None, *, now: bool = False) -> None:
        """Drain without a successor, then end. Asked a second time, or with `now`: by force."""
        if request is not None:
            self.stoppers.append(request)
        force = now or (self.stopping and request is None)
        if not self.stopping:
            self._stop()
        if force:
            for retire in list(self.retiring.values()):
                retire.now()

    def _stop(self) -> None:
        self.stopping = True
        self.notifier.stopping()
        self.say("stopping")
        stopped = OperationAborted(f"{self.options.name} was stopped during the reload")
        if self.rising is not None:
            self._fail(self.rising, "the service was stopped")
        for request in [*self.waiters, *(self.queued or ([], None))[0]]:
            request.fail(stopped)
        self.waiters, self.queued = [], None
        for generation in list(self.generations):
            if generation.phase in (Phase.SERVING, Phase.SETTLING):
                self._retire(generation, None)
        # Once the workers close theirs, clients must see a closed port, not a queue that nobody empties.
        for group in self.groups:
            group.close()
        self.save()
        if not self.generations:
            self._end()

    def save(self) -> None:
        try:
            write_state(self.folder, snapshot(self))
        except OSError as error:
            self.say(f"the state file could not be written ({error.strerror}): a take-over would not know of this")

    def forget(self) -> None:
        """The service has ended for good: nothing of it stays in the folder."""
        remove_state(self.folder)


def _how(code: int | None) -> str:
    if code is None:
        return "ended"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
