# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""In which precision, and by how many threads, a processor makes training steps fastest: found by timing steps.

What a processor says of itself does not tell: some have instructions for bfloat16 that take twice as long as float32's.
And what else runs on it is not known beforehand: threads that wait for each other on cores that another program uses
are several times slower than one thread alone. So the first steps are made in each way in turn, and the fastest is kept
until steps become slow. Each of these steps is one of the training, so nothing is lost.
"""

import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

import torch

from anomalib_pedenet.argument_checks import TrainPrecision

logger = logging.getLogger(__name__)

TURNS = 4
"""Steps made in each way before one is chosen. The first is not counted: it prepares what later ones use again."""

GAIN = 0.9
"""A way is preferred to those listed before it if it takes less than this part of their time."""

SLOW = 2.0
"""Steps that take as many times as long as when their way was chosen have all ways tried again."""

RETRY_STEPS = 200
"""After as many steps by fewer threads than there are, all ways are tried again: the other program may be gone."""

_RECENT = 8


class Way(NamedTuple):
    """How training steps are computed.

    Attributes:
        precision (str): ``"float32"`` or ``"bfloat16"`` (autocast), of the networks.
        threads (int): Threads of torch's operations.
    """

    precision: TrainPrecision
    threads: int

    def __str__(self) -> str:
        return f"{self.precision} by {self.threads} thread{'s' if self.threads > 1 else ''}"


class Pace:
    """Chooses the fastest of several ways to make training steps.

    Args:
        ways (Sequence[Way]): Ways to try, the preferred first. One alone is not timed.
        first_step (int): Step at which the training starts, or goes on. Defaults to ``0``.
        may_change (bool): Whether to try again when steps become slow. Defaults to ``True``.
        now (Callable[[], float]): Clock, in seconds.

    Attributes:
        chosen (Way | None): The fastest way; ``None`` while ways are tried.

    Examples:
        >>> import time
        >>> pace = Pace([Way("float32", 2), Way("float32", 1)])
        >>> for step in range(8):
        ...     with pace.step(step):
        ...         time.sleep(0.02 if pace.way(step).threads == 2 else 0.01)
        >>> pace.chosen
        Way(precision='float32', threads=1)
    """

    def __init__(
        self,
        ways: Sequence[Way],
        first_step: int = 0,
        may_change: bool = True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.chosen: Way | None = ways[0] if len(ways) == 1 else None
        self._ways, self._may_change, self._now = list(ways), may_change, now
        self._start = 0  # not the first step: a training that goes on in the midst of it tries what was left to try
        self._times: defaultdict[Way, list[float]] = defaultdict(list)
        self._usual, self._recent = float("inf"), deque[float](maxlen=_RECENT)
        if first_step >= self._end:
            self._start = first_step

    @property
    def precision(self) -> TrainPrecision | None:
        """The precision of the way that was chosen; ``None`` while ways are tried."""
        return None if self.chosen is None else self.chosen.precision

    @property
    def _end(self) -> int:
        """The step at which all ways have been tried."""
        return self._start + TURNS * len(self._ways)

    def way(self, step: int) -> Way:
        """Return the way in which to make a step.

        Args:
            step (int): Steps made before.

        Returns:
            Way: The one that was chosen, or that whose turn it is.
        """
        return self.chosen or self._ways[(step - self._start) % len(self._ways)]

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Have a step made by the threads of its way, and take note of how long it took.

        Args:
            step (int): Steps made before it.
        """
        threads, started = torch.get_num_threads(), self._now()
        torch.set_num_threads(self.way(step).threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        self._took(step, self._now() - started)

    def _took(self, step: int, seconds: float) -> None:
        """Choose as soon as all ways have been tried."""
        if len(self._ways) == 1:
            return
        if self.chosen is None:
            self._times[self.way(step)].append(seconds)
            if step + 1 >= self._end:
                self._choose()
        elif self._may_change:
            self._watch(step, seconds)

    def _choose(self) -> None:
        """Choose the fastest way."""
        usual = {way: median(times[1:] or times) for way, times in self._times.items()}
        fastest = min(usual.values())
        self.chosen = next(way for way in self._ways if way in usual and GAIN * usual[way] <= fastest)
        self._usual = usual[self.chosen]
        others = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in usual.items() if way != self.chosen)
        logger.info("Steps are made in %s, %.2f s each (%s).", self.chosen, self._usual, others)

    def _watch(self, step: int, seconds: float) -> None:
        """Have all ways tried again if steps have become slow, or might be made by more threads again."""
        self._recent.append(seconds)
        if len(self._recent) < _RECENT:
            return
        recent = median(self._recent)
        self._usual = min(self._usual, recent)
        has_become_slow = recent > SLOW * self._usual
        is_due = step >= self._end + RETRY_STEPS and self.way(step).threads < max(way.threads for way in self._ways)
        if has_become_slow or is_due:
            self.chosen, self._start = None, step + 1
            self._times.clear()
            self._recent.clear()


def precisions_to_try(
    device: torch.device, train_precision: TrainPrecision, earlier: TrainPrecision | None
) -> list[TrainPrecision]:
    """Return the precisions in which training steps can be made, the preferred first.

    Args:
        device (torch.device): Device of the training.
        train_precision (str): The argument of ``Pedenet``.
        earlier (str | None): What an earlier part of the training chose, to be kept where the device has it.

    Returns:
        list[str]: One, but for ``"auto"`` on a CPU that has instructions for bfloat16; others are a hundred times
            slower in it. A GPU that has them is never slower.
    """
    if train_precision != "auto":
        return [train_precision]
    precisions: list[TrainPrecision] = ["float32"]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        precisions = ["bfloat16"]
    elif device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # noqa: SLF001 - there is no public name
        precisions = ["float32", "bfloat16"]
    return [earlier] if earlier in precisions else precisions


def ways(precisions: Sequence[TrainPrecision], threads: int, may_change_threads: bool) -> list[Way]:
    """Return the ways in which training steps can be made, the preferred first.

    Args:
        precisions (Sequence[str]): Precisions.
        threads (int): Torch's number of threads.
        may_change_threads (bool): Whether half as many are a way, too.

    Returns:
        list[Way]: Every precision by each number of threads.
    """
    numbers = {threads, max(1, threads // 2)} if may_change_threads else {threads}
    return [Way(precision, number) for number in sorted(numbers, reverse=True) for precision in precisions]
