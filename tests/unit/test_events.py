"""Events without a GPU are complete from the start; the runner's rules hold on every device."""

from __future__ import annotations

import pytest
import torch

from deepep_moe import EventHandle, EventOverlap
from deepep_moe.errors import InputError, UnsupportedError
from deepep_moe.events import StreamRunner


def test_waiting_for_an_event_without_work_returns() -> None:
    kept = torch.ones(1)
    overlap = EventOverlap(EventHandle(), extra_tensors=(kept,))
    overlap.current_stream_wait()
    EventOverlap().current_stream_wait()
    assert overlap.extra_tensors == (kept,)


def test_with_waits_on_leaving_also_after_an_error() -> None:
    waited = []

    class Event(EventHandle):
        def current_stream_wait(self) -> None:
            waited.append(self)

    event = Event()
    with EventOverlap(event):
        assert waited == []
    assert waited == [event]
    with pytest.raises(ZeroDivisionError):
        with EventOverlap(event):
            _ = 1 / 0
    assert waited == [event, event]


def test_runner_on_a_cpu_returns_results_and_complete_events() -> None:
    runner = StreamRunner(torch.device("cpu"))
    result, event = runner.run(lambda: 7)
    assert result == 7
    assert event.event is None
    result, event = runner.run(lambda: 8, previous_event=EventOverlap(EventHandle()), async_finish=True)
    assert result == 8
    assert event.event is not None
    with pytest.raises(UnsupportedError, match="no streams on cpu"):
        _ = runner.stream


@pytest.mark.parametrize("options", [{}, {"async_finish": True}, {"previous_event": EventOverlap(EventHandle())}])
def test_allocating_on_the_communication_stream_needs_both(options: dict) -> None:
    with pytest.raises(InputError, match="allocate_on_comm_stream = True: needs previous_event and async_finish"):
        StreamRunner(torch.device("cpu")).run(lambda: 1, allocate_on_comm_stream=True, **options)
