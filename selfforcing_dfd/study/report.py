"""From results to documents: the numbers as JSON, the page, and the plots."""

from __future__ import annotations

from pathlib import Path

from selfforcing_dfd.common import UserError
from selfforcing_dfd.study.plan import RESULTS, find_plan, load_plan
from selfforcing_dfd.study.plots import write_plots
from selfforcing_dfd.study.results import Study, collect, load_study, save_study
from selfforcing_dfd.study.tables import summary, write_document


def write_study(plan_name: str) -> str:
    """Collect what there is, write the plan's document, and return what a terminal shows.

    Where no result lies in the plan's folder, as in a fresh checkout, the numbers beside the
    document are used. Raises UserError where there are neither.
    """
    plan = load_plan(plan_name)
    name = find_plan(plan_name).stem
    document = Path(plan.document)
    folder = document.with_suffix("")
    numbers = folder / f"{name}.json"
    study = gather(plan_name, numbers)
    write_document(study, document, write_plots(study, folder))
    return f"{summary(study)}\n\n{document}"


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
