"""Control actor: workers without heartbeats are reported as stale."""

import asyncio

from stages.runtime.control import ControlActor


def test_only_workers_without_heartbeats_are_stale_until_they_are_unregistered():
    """A stale worker is reported again after another timeout, because killing it may have failed."""
    now = 0.0
    control, stale = ControlActor(clock=lambda: now), []
    for second in range(50):
        now = float(second)
        asyncio.run(control.heartbeat("alive"))
        if second < 4:
            asyncio.run(control.heartbeat("hangs"))
        stale += [(second, worker) for worker in asyncio.run(control.stale_workers(20.0))]
    assert stale == [(24, "hangs"), (45, "hangs")]
    asyncio.run(control.unregister("hangs"))
    for second in range(50, 100):
        now = float(second)
        asyncio.run(control.heartbeat("alive"))
        assert asyncio.run(control.stale_workers(20.0)) == []


def test_pause_of_the_whole_machine_makes_no_worker_stale():
    """After a pause all timers restart, because the monitor may resume before the workers."""
    now = 0.0
    control = ControlActor(clock=lambda: now)
    asyncio.run(control.heartbeat("one"))
    assert asyncio.run(control.stale_workers(20.0)) == []
    now = 1000.0
    assert asyncio.run(control.stale_workers(20.0)) == []
    stale = []
    for second in range(1001, 1022):
        now = float(second)
        stale += asyncio.run(control.stale_workers(20.0))
    assert stale == ["one"]  # this worker did not resume
