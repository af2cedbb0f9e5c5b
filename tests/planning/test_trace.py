"""What rules record, and what is made of it beside other traces."""

from __future__ import annotations

from segfit.options import Options
from segfit.planning.plan import Decision, Outcome
from segfit.planning.trace import Asked, Replay, Trace, decisions_of


def _trace(value: int, *options: str, memory_gb: float = 8) -> Trace:
    trace = Trace()
    assert trace.decide("2d.batch_size", value, "batch_size", "memory", *options, memory_gb=memory_gb) == value
    return trace


def test_a_rule_is_told_with_its_bound_and_inputs() -> None:
    (found,) = decisions_of(_trace(12, ""), None, (), {})
    assert found == Decision(key="2d.batch_size", value=12, rule="batch_size", bound="memory", inputs={"memory_gb": 8})


def test_what_was_set_is_told_beside_what_the_rule_gives() -> None:
    trace, by_rule = _trace(3, "planning.batch_size", memory_gb=4), _trace(12)
    (found,) = decisions_of(trace, by_rule, [Replay(trace=_trace(24), memory_gb=16)], {"batch_size": ("memory",)})
    assert (found.value, found.by_rule, found.options) == (3, 12, ("planning.batch_size",))
    assert found.inputs == {"memory_gb": 8}
    assert found.outcomes == ()  # more memory leaves it as it was set
    (alone,) = decisions_of(trace, Trace(), (), {})
    assert (alone.rule, alone.by_rule) == ("", None)


def test_replays_are_compared_by_key() -> None:
    replays = [
        Replay(trace=_trace(24), memory_gb=16, preset="resenc-m"),
        Replay(trace=Trace(), memory_gb=24),
        Replay(trace=None, memory_gb=32),
        Replay(trace=_trace(12), cases=40),
    ]
    (found,) = decisions_of(_trace(12), None, replays, {"batch_size": ("memory",)})
    assert found.outcomes == (
        Outcome(memory_gb=16, preset="resenc-m", state="planned", value=24),
        Outcome(memory_gb=24, state="absent"),
        Outcome(memory_gb=32, state="refused"),
    )
    (told,) = decisions_of(_trace(12), None, replays, {"batch_size": ("cases",)})
    assert told.outcomes == (Outcome(cases=40, state="planned", value=12),)


def test_the_second_stage_of_a_cascade_has_the_values_of_3d_fullres() -> None:
    options = Options().with_settings(["planning.3d_fullres.batch_size=3", "planning.2d.batch_size=4"])
    trace = Trace()
    asked = {name: Asked(options.planning, trace, name) for name in ("2d", "3d_lowres", "3d_cascade_fullres")}
    assert {name: one("batch_size", 2) for name, one in asked.items()} == {
        "2d": 4,
        "3d_lowres": 2,
        "3d_cascade_fullres": 3,
    }
    assert [one.option("batch_size") for one in asked.values()] == [
        "planning.2d.batch_size",
        "",
        "planning.3d_fullres.batch_size",
    ]
    assert asked["2d"].own("batch_size")
    assert not asked["3d_lowres"].own("batch_size")
    assert list(asked["2d"].leaves()) == ["batch_size"]
