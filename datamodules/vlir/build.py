"""The corpus of VLIR, from questions with answers to rationales that passed every filter.

Nothing of a run is in memory alone: replies are on disk before they are used (`datamodules.vlir.endpoint`), and all
else is computed anew from them. So a run that was killed goes on where it was, a filter can be changed without paying
for what it does not touch, and the same replies give the same corpus, in whatever order they came.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from datamodules.images import BadImage
from datamodules.sources.base import Source
from datamodules.vlir.checks import Check
from datamodules.vlir.collect import Images, collect
from datamodules.vlir.corpus import Refusal, Splits, write_corpus
from datamodules.vlir.draft import Draft, Reason, Rejected
from datamodules.vlir.endpoint import Fatal, Unpaid
from datamodules.vlir.fingerprints import check_installed
from datamodules.vlir.meter import Meter
from datamodules.vlir.rules import AnswerRule, BoxRules, Question
from datamodules.vlir.schema import DataError, Invalid
from datamodules.vlir.teacher import Attempts, Teacher


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a question."""

    question: Question
    draft: Draft | None
    refusals: tuple[Refusal, ...]  # of the attempts before

    @property
    def unanswered(self) -> str | None:
        """What kept an endpoint from answering, if that is why there is no sample."""
        last = self.refusals[-1].error if self.refusals and self.draft is None else None
        return last.detail if last is not None and last.reason is Reason.NO_REPLY else None


@dataclass(frozen=True)
class Build:
    """What a corpus is made of, by whom, and what passes.

    Args:
        out: folder of the corpus: ``<split>.jsonl``, ``images/``, ``rejected.jsonl``, ``replies/`` and the report.
        teacher: who writes.
        sources: of questions with answers; rationales in them are not looked at.
        checks: who judges, in this order; put the cheap one first.
        images: which images are left out.
        boxes: which boxes are sane.
        answers: which answers are right.
        splits: into which files, and how much in each.
        workers: questions at a time.
        patience: after so many questions in a row without a reply the run ends.
        limit: take at most so many questions.
    """

    out: str
    teacher: Teacher
    sources: list[Source]
    checks: list[Check] = field(default_factory=list)
    images: Images = field(default_factory=Images)
    boxes: BoxRules = field(default_factory=BoxRules)
    answers: AnswerRule = field(default_factory=AnswerRule)
    splits: Splits = field(default_factory=Splits)
    workers: int = 16
    patience: int = 20
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("patience", self.patience), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` to be at least 1, but got {value}.")
        if not self.sources:
            raise ValueError("Expected `sources` to name at least one, but got none.")
        names = [check.name for check in self.checks]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each of `checks` once, but got {', '.join(names)}.")


def build(plan: Build) -> bool:
    """Build a corpus; run again with the same folder, it goes on where it ended.

    Returns:
        Whether every question was answered; if not, another run asks the rest again.

    Raises:
        DataError: the data, an endpoint or the disk cannot be used.
    """
    check_installed()
    folder = Path(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        questions, refusals = collect(folder, plan.sources, plan.images, plan.limit)
        writing = plan.teacher.open(folder / "replies")
        callers = {"teacher": writing} if writing is not None else {}
        callers |= {check.name: check.open(folder / "replies") for check in plan.checks}
        with Meter(len(questions), list(callers.values())) as meter:
            outcomes = judged(questions, plan, meter)
        refusals += [refusal for outcome in outcomes for refusal in outcome.refusals]
        kept = [(outcome.question, outcome.draft) for outcome in outcomes if outcome.draft is not None]
        write_corpus(folder, kept, refusals, len(questions), plan.teacher.name, plan.splits, callers)
    return not any(outcome.unanswered for outcome in outcomes)


def judged(questions: Sequence[Question], plan: Build, meter: Meter) -> list[Outcome]:
    """What becomes of every question, in their order.

    Raises:
        DataError: nobody replies any more.
    """
    place = {id(question): k for k, question in enumerate(questions)}
    outcomes: dict[int, Outcome] = {}
    silent = 0
    pool = ThreadPoolExecutor(plan.workers)
    works = plan.teacher.works(questions)
    waiting: set[Future[Outcome]] = set()
    try:
        while True:
            while len(waiting) < 2 * plan.workers and (work := next(works, None)) is not None:
                waiting.add(pool.submit(examine, *work, plan))
            if not waiting:
                return [outcomes[k] for k in range(len(questions))]
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in done):
                outcomes[place[id(outcome.question)]] = outcome
                silent = silent + 1 if outcome.unanswered else 0
                meter.add(outcome.draft is not None)
                if silent >= plan.patience:
                    raise DataError(f"{silent} questions in a row got no reply, the last: {outcome.unanswered}")
    except Fatal as error:
        raise DataError(str(error)) from None
    finally:  # what is asked already is waited for, so that it is kept
        pool.shutdown(cancel_futures=True)


def examine(question: Question, attempts: Attempts, plan: Build) -> Outcome:
    """Try one attempt after another until one passes.

    Raises:
        Fatal: an endpoint cannot be used.
    """
    refusals: list[Refusal] = []

    def refuse(error: Rejected) -> None:
        sample, number = question.sample, len(refusals) + 1
        refusals.append(Refusal(sample.id, sample.source, question.file, question.row, number, error))

    try:
        for draft in attempts:
            try:
                if isinstance(draft, Rejected):
                    raise draft
                plan.boxes.check(question, draft)
                plan.answers.check(question, draft)
                for check in plan.checks:
                    check.check(question, draft)
                return Outcome(question, draft, tuple(refusals))
            except Rejected as error:
                text = error.text if isinstance(draft, Rejected) else draft.text
                refuse(Rejected(error.reason, error.detail, text))
    except Unpaid as error:
        refuse(Rejected(Reason.NO_REPLY, str(error)))
    except (BadImage, Invalid) as error:  # it was there when the questions were read
        refuse(Rejected(Reason.BAD_IMAGE, str(error)))
    return Outcome(question, None, tuple(refusals))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run a folder: two would pay for the same requests."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{folder}: another run is building this corpus.") from None
        yield
