"""How long steps take, how much of that is waiting for data, and which rank is the slow one."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from d2v_ds.training.watchdog import Watchdog


class Clock:
    """Seconds of steps since the last log; one goes to the watchdog after the other.

    A rank's own seconds are those in which it waits for no other: from the end of a step to the meeting of all ranks
    at the next one's beginning, and its forward and backward passes. At ZeRO-3 these have gathers inside, in which
    all wait for the slowest, so there only what is outside of the passes tells ranks apart.
    """

    def __init__(self, watchdog: Watchdog, device: torch.device) -> None:
        self.watchdog, self.is_cuda = watchdog, device.type == "cuda"
        self.device = device
        self.began = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.steps, self.total, self.waited, self.own = 0, 0.0, 0.0, 0.0

    def start(self, step: int) -> None:
        self.watchdog.begin(step)
        self.began = time.perf_counter()

    def got_data(self) -> None:
        self.waited += time.perf_counter() - self.began
        self.watchdog.what = "computing"

    def arrived(self) -> None:
        """At the meeting."""
        self.own += time.perf_counter() - self.began
        self.watchdog.what = "waiting for the other ranks"

    def met(self) -> None:
        self.watchdog.what = "computing"
        self.met_at = self._now()

    def computed(self) -> None:
        self.computed_at = self._now()

    def did_step(self) -> None:
        seconds = time.perf_counter() - self.began
        self.total += seconds
        self.steps += 1
        self.own += self._between(self.met_at, self.computed_at)
        self.watchdog.end(seconds)

    def ranks(self) -> dict[str, float]:
        """Own seconds a step: of the slowest rank, which it is, and of the middle one (the lower of two)."""
        everyone = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=self.device)
        everyone[dist.get_rank()] = self.own / self.steps
        dist.all_reduce(everyone)
        seconds = everyone.tolist()
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {
            "slowest_rank": slowest,
            "slowest_rank_seconds": seconds[slowest],
            "median_rank_seconds": sorted(seconds)[(len(seconds) - 1) // 2],
        }

    def _now(self) -> torch.cuda.Event | float:
        """On a GPU the host is ahead of what is computed."""
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        if not self.is_cuda:
            return end - start
        end.synchronize()  # long since: the step itself waited for its norm
        return start.elapsed_time(end) / 1e3
