"""All cases of a request, one after the other; what is measured is on disk after each of them."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..prepare import usable_device
from .article import measure_article
from .cases import ARTICLE, FORWARD, GROWTH, BenchRequest, Case, NeedsOf, Result, list_cases, what_fits_not
from .comparison import AgainstReport
from .forwards import measure_forward
from .measure import device_bytes, device_name, read_commit
from .other_networks import MEASURES
from .plot import draw
from .prediction import Prediction, prediction_lines
from .report import report_lines
from .session import Session

log = logging.getLogger(__name__)

MEASURE: dict[str, Callable[[Session, Case], Result]] = {
    FORWARD: measure_forward,
    GROWTH: measure_forward,
    ARTICLE: measure_article,
    **MEASURES,
}


@dataclass(frozen=True)
class Planned:
    """A case before it runs."""

    case: Case
    flop: float
    weight_bytes: int
    working_bytes: int
    refusal: str | None

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("flop", "weight_bytes", "working_bytes", "refusal")}
        return {"case": self.case.name, "label": self.case.label(), "steps": self.case.steps} | own

    def line(self) -> str:
        work = f"{self.flop / 1e12:,.4g} TFLOP" if self.flop else "-"
        memory = f"{self.weight_bytes / 1e9:.2f} + {self.working_bytes / 1e9:.2f} GB"
        return f"{self.case.label():<48} {work:>20}  {memory:>18}" + (f"  {self.refusal}" if self.refusal else "")


def plan_run(request: BenchRequest) -> list[Planned]:
    """What would run, with what each case is predicted to need, and why some have no room."""
    device, needs_of = usable_device(request.device), NeedsOf(request)
    total = device_bytes(device) if request.memory_gb is None else round(request.memory_gb * 1e9)
    planned = []
    for case in list_cases(request):
        needs = needs_of(case)
        refusal = what_fits_not(needs, total, device)
        planned.append(Planned(case, needs.flop, needs.weight_bytes, needs.working_bytes, refusal))
    return planned


@torch.inference_mode()
def run_cases(request: BenchRequest, planned: Sequence[Planned], commit: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield the entry of each case as soon as it is measured. One that fails says why, and the others go on."""
    device = usable_device(request.device)
    session = Session(request, device)
    facts = {
        "weights": request.source.weights,
        "gpu": device_name(device),
        "torch": torch.__version__,
        "commit": commit or read_commit(),
    }
    for plan in planned:
        log.info("measuring %s", plan.case.label())
        own = facts | ({"weights": "random"} if plan.case.group == GROWTH else {})
        result = Result(error=plan.refusal) if plan.refusal else measure(session, plan.case)
        yield result.to_entry(plan.case, own)


def measure(session: Session, case: Case) -> Result:
    """One case; what a card, a kernel or a setting refuses becomes the result's error."""
    try:
        return MEASURE[case.group](session, case)
    except (RuntimeError, ValueError, ImportError) as error:  # no memory, no such kernel, no such file or setting
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        log.debug("%s", case.label(), exc_info=True)
    session.drop()  # behind the except clause, whose traceback would hold the tensors
    log.warning("%s was not measured: %s", case.label(), reason)
    return Result(error=reason)


@dataclass(frozen=True)
class Output:
    """Where results go."""

    folder: Path | None
    command: str = ""

    def save(self, entries: Sequence[dict[str, Any]]) -> None:
        """bench.json; after every case, so that a run that is stopped has kept what it measured."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(entries, indent=1, allow_nan=False)
            unfinished = self.folder / "bench.json.part"
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(self.folder / "bench.json")

    def finish(
        self, entries: Sequence[dict[str, Any]], against: AgainstReport | None, predictions: Sequence[Prediction]
    ) -> str:
        """The report in markdown; into the folder as well, with plot and predictions."""
        lines = list(report_lines(entries, self.command))
        for extra in (against and against.lines(), predictions and prediction_lines(predictions)):
            if extra:
                lines += ["", *extra]
        text = "\n".join(lines) + "\n"
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "bench.md").write_text(text, encoding="utf-8")
            draw(entries, self.folder)
            if predictions:
                told = json.dumps([found.to_dict() for found in predictions], indent=1)
                (self.folder / "predictions.json").write_text(told, encoding="utf-8")
        return text
