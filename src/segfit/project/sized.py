"""The plan with what is trained: decided once, on the machine that trains."""

from __future__ import annotations

from segfit.planning.plan import Plan
from segfit.project.decide import decide_run
from segfit.project.forecast import forecast_words
from segfit.project.preparation import Preparation
from segfit.project.trainings import is_begun

__all__ = ["sized_plan"]


def sized_plan(project: Preparation) -> Plan:
    """Return the plan with its run; it is decided now if it was not, or was for another machine."""
    found = project.plan()
    if found.run is None or found.machine != project.hardware.machine:
        with project.locks.held("what is trained"):
            found = _for_this_machine(project, project.known_plan() or found)  # others may have decided meanwhile
            if found.run is None:
                found = project.results.store(_decided(project, found), project.plan_folder.plan, project.plan_key)
    project.documents.publish(project.plan_folder.plan, project.folder.plan)
    return found


def _for_this_machine(project: Preparation, plan: Plan) -> Plan:
    """Return a plan that was made on another machine as it is, or a new one where nothing is trained by it yet."""
    here = project.hardware.machine
    if plan.machine == here or project.looked_at_machine:
        return plan
    project.looked_at_machine = True
    made_for = f"the plan was made for {plan.machine or 'an unknown machine'}, this is {here}"
    if project.plan_folder.race.exists() or is_begun(project, plan):
        project.progress.note(f"{made_for}: it is kept, as trainings by it have begun")
        return plan
    project.progress.note(f"{made_for}: it is made anew, as nothing is trained by it yet")
    return project.plan_anew()


def _decided(project: Preparation, plan: Plan) -> Plan:
    """Return the plan with its run."""
    plan = decide_run(project, plan)
    assert plan.run is not None
    project.progress.note(forecast_words(plan.run))
    return plan.model_copy(update={"machine": project.hardware.machine})
