"""A language model's verdict, from any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules.chat import ChatClient, ChatError, read_template
from modules.policy import PolicyError, PolicyModule
from modules.rewards.base import Reward
from modules.trajectory import Trajectory

logger = logging.getLogger(__name__)

PROMPT = Path(__file__).with_name("judge_prompt.txt")
FIELDS = ("question", "choices", "answers", "answer", "text")
MAX_FIELD = 8_000  # characters of one field; the judge's context is not the policy's to fill

_MARKS = " \t*_`\"'"  # of Markdown and quotation
_VERDICT = re.compile(r"(?:(?:score|verdict|answer|reward)\s*[:=]\s*)?([01](?:\.\d+)?|0?\.\d+|yes|no)", re.IGNORECASE)


class Judge(Reward):
    """What a judge model says of a trajectory, 0 to 1; NaN (left out and counted, never scored) where it fails.

    Equal prompts are asked once, and verdicts are kept on disk. Requests of a batch run side by side; those that meet
    a limit (429), an error of the server (5xx) or a timeout are repeated with exponential back-off. The key is read
    from the environment whenever a request is made, and held nowhere else.

    Args:
        model: its name at the endpoint.
        base_url: of the endpoint, such as ``http://localhost:8000/v1``.
        prompt: a text file with the placeholders ``$question``, ``$choices``, ``$answers`` (those known to be right),
            ``$answer`` (the policy's) and ``$text`` (all that it wrote); a dollar sign is ``$$``. The last line of
            the reply has to be a number from 0 to 1, yes or no. None is `judge_prompt.txt` beside this file.
        key_variable: the environment variable that holds the key; None for an endpoint without one.
        cache: folder of verdicts, which runs may share; None keeps nothing.
        options: what else stands in a request; None is ``{"temperature": 0, "max_tokens": 512}``.
        concurrency: requests at a time.
        timeout: seconds for one request.
        attempts: for one request, the first included.
        backoff: seconds before the first repetition; each later one waits twice as long, give or take a half.
        deadline: seconds for a batch; what has no verdict by then is left out.
        fail_fast: whether a missing key or an endpoint that cannot be reached ends the run at its start; else it is
            only said in the log.
        weight: see `Reward`.
        requires: see `Reward`.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        prompt: str | None = None,
        key_variable: str | None = "OPENAI_API_KEY",
        cache: str | None = None,
        options: dict[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        attempts: int = 5,
        backoff: float = 1.0,
        deadline: float = 600.0,
        fail_fast: bool = True,
        weight: float = 1.0,
        requires: str | None = None,
    ) -> None:
        super().__init__(weight, requires)
        self.template = read_template(PROMPT if prompt is None else Path(prompt), FIELDS)
        self.fail_fast = fail_fast
        self.client = ChatClient(
            model=model,
            base_url=base_url,
            key_variable=key_variable,
            cache=None if cache is None else Path(cache).expanduser(),
            options={"temperature": 0, "max_tokens": 512} if options is None else options,
            concurrency=concurrency,
            timeout=timeout,
            attempts=attempts,
            backoff=backoff,
            deadline=deadline,
        )

    def setup(self, policy: PolicyModule) -> None:
        """See `Reward`."""
        try:
            self.client.check()
        except ChatError as error:
            if self.fail_fast:
                raise PolicyError(str(error)) from None
            logger.warning("the judge will fail: %s", error)

    def __call__(self, trajectory: Trajectory) -> float:
        """See `Reward`."""
        return self.batch([trajectory])[0]

    def batch(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """See `Reward`."""
        needs = set(self.template.get_identifiers())
        values = [_without_asking(trajectory, needs) for trajectory in trajectories]
        asked = [k for k, value in enumerate(values) if value is None]
        replies = self.client.ask([self.fill(trajectories[k]) for k in asked], accept=_is_verdict)
        for k, reply in zip(asked, replies, strict=True):
            values[k] = math.nan if reply is None else verdict(reply)
        return [math.nan if value is None else value for value in values]

    def fill(self, trajectory: Trajectory) -> str:
        """The prompt about a trajectory."""
        sample = trajectory.sample
        fields = {
            "question": sample.question,
            "choices": "; ".join(sample.choices) or "none",
            "answers": "; ".join(sample.answers),
            "answer": trajectory.answer or "",
            "text": trajectory.text,
        }
        return self.template.substitute({name: value[:MAX_FIELD] for name, value in fields.items()})


def _without_asking(trajectory: Trajectory, needs: set[str]) -> float | None:
    """The value where there is nothing to ask: no right answer is known, or none was given; else None."""
    if "answers" in needs and not trajectory.sample.answers:
        return math.nan
    return 0.0 if "answer" in needs and not trajectory.answer else None


def verdict(reply: str) -> float:
    """The last line of a reply as a number from 0 to 1; NaN if it is none."""
    lines = reply.strip().splitlines()
    found = _VERDICT.fullmatch(lines[-1].strip(_MARKS).rstrip(".")) if lines else None
    if found is None:
        return math.nan
    word = found.group(1).lower()
    value = {"yes": 1.0, "no": 0.0}.get(word)
    value = float(word) if value is None else value
    return value if value <= 1 else math.nan


def _is_verdict(reply: str) -> bool:
    return not math.isnan(verdict(reply))
