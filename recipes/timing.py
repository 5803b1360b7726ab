"""Where the time of a training run goes: the phases of a step, and a profile of one step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from reports import Journal
from torch import Tensor


class _OnBackward(torch.autograd.Function):
    """Identity whose backward calls ``hook`` once the gradients of all its tensors are there."""

    @staticmethod
    def forward(ctx: Any, hook: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.hook = hook
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.hook()
        return (None, *gradients)


class PhaseTimer:
    """Seconds that the device spends in named phases of a step, forward and backward.

    On a GPU these are CUDA events on the current stream: work that another stream hides does not count, and
    nothing waits before :meth:`collect`. Events that are captured in a CUDA graph are recorded by each of its replays.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.active = True
        self._pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._captured: dict[str, list[tuple[Any, Any]]] = defaultdict(list)  # in a CUDA graph
        self._open: dict[object, Any] = {}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with its time, and that of its backward, added to ``phase``."""

        def call(*args: Any) -> Any:
            if not self.active:
                return function(*args)
            key = object()
            begin_backward, end_backward = self._backward_hooks(phase, key)
            args = self._mark(args, end_backward)
            start = self._now()
            result = function(*args)
            self._add(phase, start)
            if isinstance(result, tuple):
                return self._mark(result, begin_backward)
            return self._mark((result,), begin_backward)[0]

        return call

    def _add(self, phase: str, start: Any) -> None:
        captured = self.cuda and torch.cuda.is_current_stream_capturing()
        (self._captured if captured else self._pairs)[phase].append((start, self._now()))

    def forget(self) -> None:
        """Drop everything measured, and the events of a CUDA graph that will not run again."""
        self._pairs.clear()
        self._captured.clear()

    def _backward_hooks(self, phase: str, key: object) -> tuple[Callable[[], None], Callable[[], None]]:
        def begin() -> None:
            self._open[key] = self._now()

        def end() -> None:
            if key in self._open:
                self._add(phase, self._open.pop(key))

        return begin, end

    @staticmethod
    def _mark(values: tuple[Any, ...], hook: Callable[[], None]) -> tuple[Any, ...]:
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        if not places:
            return values
        marked = dict(zip(places, _OnBackward.apply(hook, *(values[i] for i in places))))
        return tuple(marked.get(i, value) for i, value in enumerate(values))

    def wait(self) -> None:
        """Until the device has done what was enqueued."""
        if self.cuda:
            torch.cuda.synchronize()

    def collect(self) -> dict[str, float]:
        """Seconds per phase since the last call, with those of the last replay of a CUDA graph."""
        self.wait()
        seconds: dict[str, float] = defaultdict(float)
        for measured in (self._pairs, self._captured):
            for phase, pairs in measured.items():
                for start, stop in pairs:
                    seconds[phase] += start.elapsed_time(stop) / 1000 if self.cuda else stop - start
        self._pairs.clear()
        return dict(seconds)


@contextmanager
def profiled(journal: Journal) -> Iterator[None]:
    """Inside, rank 0 runs under torch.profiler: ``profile.txt`` (where the time went) and ``trace.json`` (timeline)."""
    if not journal.active:
        yield
        return
    from torch.profiler import DeviceType, ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    profiler.export_chrome_trace(str(journal.folder / "trace.json"))
    orders = ["self_cuda_time_total", "self_cpu_time_total"] if cuda else ["self_cpu_time_total"]
    tables = [profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=90) for order in orders]
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    (journal.folder / "profile.txt").write_text(
        f"step {1e3 * wall:.1f} ms on the host\n{_describe_gaps(kernels)}\n" + "\n".join(tables), encoding="utf-8"
    )
    journal.say(f"profile: {journal.folder / 'profile.txt'}, {journal.folder / 'trace.json'}")


def _describe_gaps(kernels: list[tuple[float, float, str]]) -> str:
    """When the GPU was busy, and the longest times when it was not, from (start, end, name) in us."""
    if not kernels:
        return "no work on a GPU"
    busy, idle, (begin, end, before) = 0.0, [], kernels[0]
    first = begin
    for start, stop, name in kernels[1:]:
        if start > end:
            busy += end - begin
            idle.append((start - end, before, name))
            begin = start
        if stop > end:
            end, before = stop, name
    busy += end - begin
    lines = [
        f"GPU: {len(kernels)} kernels and copies in {(end - first) / 1e3:.1f} ms, busy {busy / 1e3:.1f} ms, "
        f"idle {sum(gap for gap, *_ in idle) / 1e3:.1f} ms in {len(idle)} gaps; the longest:"
    ]
    lines += [f"  {gap:8.0f} us after {one[:70]} before {two[:70]}" for gap, one, two in sorted(idle)[:-16:-1]]
    return "\n".join(lines)
