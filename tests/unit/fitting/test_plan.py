"""The plan of a fit, from the sizes of its graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deepprob.fitting.plan import Plan, Work, compile_seconds, pays_to_trace, planned

WORK = Work(300, 10**6, 10**7)
PAYS = round(compile_seconds(300) / WORK.saved_seconds) + 1  # steps for which compiling pays


def names(plan: Plan) -> list[str]:
    return [name for name, _ in plan.tiers]


@pytest.mark.parametrize("beside", [False, True])
def test_tiers_by_the_number_of_steps(beside: bool) -> None:
    assert names(planned("auto", PAYS // 10, WORK, cached=False, beside=beside)) == ["traced"]
    assert names(planned("auto", PAYS - 2, WORK, cached=False, beside=beside)) == ["traced"]
    assert names(planned("auto", PAYS, WORK, cached=False, beside=beside))[-1] == "compiled"
    assert names(planned("auto", 100 * PAYS, WORK, cached=False)) == ["compiled"]


def test_code_is_built_beside_a_long_fit_which_waits_for_it_at_a_named_step() -> None:
    plan = planned("auto", 100 * PAYS, WORK, cached=False, beside=True)
    assert names(plan) == ["traced", "compiled"]
    assert plan.build
    assert plan.tiers[1][1] * WORK.seconds == pytest.approx(compile_seconds(300), rel=0.01)
    assert plan == planned("auto", 100 * PAYS, WORK, cached=False, beside=True)


def test_code_is_built_for_the_next_fits_if_five_pay_for_it() -> None:
    built = planned("auto", PAYS // 4, WORK, cached=False, beside=True)
    assert (names(built), built.build) == (["traced"], True)
    assert not planned("auto", PAYS // 6, WORK, cached=False, beside=True).build
    assert not planned("auto", PAYS // 4, WORK, cached=False).build  # nobody could build it beside


def test_code_is_built_first_where_the_steps_after_the_takeover_do_not_pay_for_another_process() -> None:
    assert names(planned("auto", PAYS, WORK, cached=False, beside=True)) == ["compiled"]


def test_steps_with_a_loop_over_time_are_eager_until_they_are_compiled() -> None:
    recurrent = replace(WORK, recurs=True)
    assert names(planned(False, 10**9, recurrent, cached=False)) == ["eager"]
    assert names(planned("auto", PAYS // 10, recurrent, cached=False)) == ["eager"]
    assert names(planned("auto", 100 * PAYS, recurrent, cached=False, beside=True)) == ["eager", "compiled"]
    assert names(planned(True, 1, recurrent, cached=False)) == ["compiled"]


def test_code_that_is_there_or_on_its_way_is_used() -> None:
    assert names(planned("auto", 10, WORK, cached=True)) == ["compiled"]
    assert names(planned("auto", 10, WORK, cached=False, building=True)) == ["compiled"]


@pytest.mark.parametrize("cached", [False, True])
def test_true_and_false_leave_no_choice(cached: bool) -> None:
    assert names(planned(True, 1, WORK, cached=cached)) == ["compiled"]
    assert names(planned(False, 10**9, WORK, cached=cached, beside=True)) == ["traced"]


def test_plan_as_json() -> None:
    plan = planned("auto", 100 * PAYS, WORK, cached=False, beside=True)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_tracing_must_pay() -> None:
    assert not pays_to_trace(100, 150)
    assert pays_to_trace(10_000, 150)
