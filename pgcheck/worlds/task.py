"""What the two worlds of a language task share that is too large for a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgcheck.envs.language import LMTask
from pgcheck.errors import BudgetError
from pgcheck.trajectories import SideTable, Trajectories
from pgcheck.worlds.base import World


@dataclass(frozen=True)
class OfTask(World):
    """A task whose completions are too many for a table."""

    task: LMTask

    @property
    def discount(self) -> float:
        return 1.0

    @property
    def rollouts(self) -> int:
        return self.task.completions

    @property
    def most_decisions(self) -> int:
        return self.task.max_new_tokens

    @property
    def fixed_length(self) -> bool:
        return self.task.eos is None or self.task.max_new_tokens == 1

    @property
    def one_start(self) -> bool:
        return len(self.task.prompts) == 1

    def table(self, needs: Sequence[SideTable] = ()) -> Trajectories:
        raise BudgetError(self.task.too_many())

    def _check_no_needs(self, needs: Sequence[SideTable], problem: str) -> None:
        if needs:
            raise BudgetError(
                f"{problem}: an estimator that needs more than its rows is given it from the table of all rollouts, and"
                " this task has too many; judge it on a smaller one."
            )
