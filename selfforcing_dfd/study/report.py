"""From results to documents: the numbers as JSON, the page, and the plots."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.common import UserError
from selfforcing_dfd.study.known import take_known
from selfforcing_dfd.study.plan import RESULTS, find_plan, load_plan, runs_of
from selfforcing_dfd.study.plots import write_plots
from selfforcing_dfd.study.results import Study, collect, load_study, save_study
from selfforcing_dfd.study.tables import summary, write_document
from selfforcing_dfd.study.work import prepare


def write_study(plan_name: str) -> str:
    """Collect what there is, write the plan's document, and return what a terminal shows.

    Where no result lies in the plan's folder, as in a fresh checkout, the numbers beside the
    document are used. Raises UserError where there are neither.
    """
    plan = load_plan(plan_name)
    document = Path(plan.document)
    numbers = numbers_of(plan_name)
    study = gather(plan_name, numbers)
    write_document(study, document, write_plots(study, numbers.parent))
    return f"{summary(study)}\n\n{document}"


def take_from_page(plan_name: str) -> list[str]:
    """Take the runs that the numbers beside the plan's page hold; what was taken, in lines.

    Raises UserError where there are no such numbers.
    """
    plan = load_plan(plan_name)
    numbers = numbers_of(plan_name)
    if not numbers.exists():
        raise UserError(f"there is no {numbers}, so no run is known; drop --known")
    prepare(plan)
    taken, refused = take_known(runs_of(plan), load_study(numbers))
    return [*refused, f"taken from {numbers}: {taken}; refused: {len(refused)}"]


def numbers_of(plan_name: str) -> Path:
    """The JSON file in the folder beside a plan's page."""
    folder = Path(load_plan(plan_name).document).with_suffix("")
    return folder / f"{find_plan(plan_name).stem}.json"


def gather(plan_name: str, numbers: Path) -> Study:
    """The study as saved in `numbers`, after it was collected anew where results are at hand.

    It is read back from the file, so that a table never shows what the file does not hold.
    """
    plan = load_plan(plan_name)
    if any((Path(plan.out) / RESULTS).glob("*/*/*.json")):
        save_study(collect(find_plan(plan_name).stem, plan), numbers)
    if not numbers.exists():
        raise UserError(
            f"neither results in {plan.out} nor {numbers}; run the study without --tables-only"
        )
    return load_study(numbers)
