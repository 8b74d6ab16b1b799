"""SIGTERM (schedulers, before they kill), Ctrl-C, SIGHUP: the run ends after the step in hand, with a checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from swiftlite.arguments.train import TrainArguments
from swiftlite.utils.dist import is_main_process
from swiftlite.utils.logger import get_logger

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None
_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_IMPATIENT_SECONDS = 2.0  # one Ctrl-C may arrive twice, from the terminal and from torchrun


class StopSignal:
    """`with StopSignal() as stop:` catches the signals; `stop.requested` says whether this process was sent one.

    number: which, None before. A second Ctrl-C, some seconds later, ends the process at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.early = ""  # why the run is to end, on any rank: --early_stop_interval, a plugin
        self._since = 0.0
        self._previous: dict[int, Handler] = {}

    @property
    def requested(self) -> bool:
        return self.number is not None or bool(self.early)

    def __enter__(self) -> StopSignal:
        try:
            for number in _NUMBERS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    self._previous[number] = signal.signal(number, self._note)
        except ValueError:  # not the main thread: the caller's program handles signals
            self._previous = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
        elif number == signal.SIGINT and now - self._since > _IMPATIENT_SECONDS:
            raise KeyboardInterrupt

    @property
    def why(self) -> str:
        return self.early or self.sent.name

    def ended(self, stopped: bool) -> signal.Signals | None:
        """The signal that a run ended by; None: it was done, or ended itself."""
        return self.sent if stopped and not self.early else None

    @property
    def sent(self) -> signal.Signals:
        """The signal; on a rank that was sent none, the one that schedulers send."""
        return signal.Signals(self.number or signal.SIGTERM)


def say_how_to_go_on(args: TrainArguments, stop: StopSignal) -> None:
    """The last words of a run that a signal ended."""
    if not is_main_process() or stop.early:
        return
    again = "the same command resumes from there"
    if args.add_version:
        again = f"to resume, give the same command with --output_dir {args.output_dir} and without --add_version"
    get_logger().warning("stopped by %s with everything saved in %s; %s", stop.sent.name, args.output_dir, again)
