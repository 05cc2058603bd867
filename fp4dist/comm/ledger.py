"""Bytes that this rank has sent, by direction: coded, in high precision, and what the engine would have sent."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Account:
    """Bytes of one direction. `plain` is what the engine's own collectives would have sent for the same data; `extra`
    what the proof costs (canaries, validation), which the other fields leave out.
    """

    coded: int = 0
    exact: int = 0
    plain: int = 0
    extra: int = 0

    def add(self, other: Account) -> None:
        """Sum up."""
        self.coded += other.coded
        self.exact += other.exact
        self.plain += other.plain
        self.extra += other.extra


@dataclass(slots=True)
class Ledger:
    """The accounts of a step and of all steps before it in this process."""

    step: dict[str, Account] = field(default_factory=dict)
    total: dict[str, Account] = field(default_factory=dict)

    def book(self, direction: str, *, coded: int = 0, exact: int = 0, plain: int = 0, extra: int = 0) -> None:
        """Add to the running step."""
        self.step.setdefault(direction, Account()).add(Account(coded, exact, plain, extra))

    def close_step(self) -> dict[str, Account]:
        """The step's accounts, which move into the totals."""
        done, self.step = self.step, {}
        for direction, account in done.items():
            self.total.setdefault(direction, Account()).add(account)
        return done
