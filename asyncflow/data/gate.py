"""The staleness gate: when a group may start, when it may be taken, and why that bounds staleness.

Let P groups make an optimizer step, S be the bound, W the look-ahead, v the trainer's version.

**Admission.** A group may start while ``admitted - dropped < (live_version + 1 + S) * P``.

**Order.** The *rank* of a group is the number of groups admitted before it and not dropped.
In the step that makes version v + 1, a group may be taken when its rank is below
``(v + 1) * P``, or below ``r + W`` where r is the rank of the oldest group not yet taken.

**Claim.** No token is older than ``S + ceil((W - 1) / P)`` versions when it is trained on.

*Proof.* Let group i be admitted while version u is live. Its tokens are sampled under u or
later weights. Its rank at admission is at most (u + 1 + S) P - 1, and ranks only fall
(an older group may be dropped later, none can be admitted before it). Suppose it is trained
at version v. If v <= rank / P the order is strict there and v <= u + S. Otherwise, after the
steps before v exactly v P groups had been taken and i had not; by the order rule each of
their ranks was below v P or below rank(i) + W, because i itself was the oldest or younger
than the oldest group not taken. If all were below v P, then with i (rank below v P, not
taken) there would be more than v P groups of rank below v P: impossible. So the v P taken
ones and i itself fit below rank(i) + W: v P + 1 <= rank(i) + W, hence
v <= (rank(i) + W - 1) / P <= ((u + 1 + S) P + W - 2) / P, and for whole v that is at most
u + S + ceil((W - 1) / P). With W = 1 the bound is S itself.  ∎

Inside one step the order is free: all P groups are needed anyway, so a group is trained the
moment it is complete. ``S = 0`` is synchronous training.

The bound is asserted on every batch as well (`asyncflow.workflow.staleness`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The rule for one run of `steps` optimizer steps."""

    groups_per_step: int
    max_staleness: int
    steps: int
    look_ahead: int = 1

    @property
    def bound(self) -> int:
        """Versions a trained token may be old at most.

        >>> Gate(groups_per_step=4, max_staleness=1, steps=9, look_ahead=6).bound
        3
        """
        return self.max_staleness + -(-(self.look_ahead - 1) // self.groups_per_step)

    def may_admit(self, *, admitted: int, dropped: int, live_step: int) -> bool:
        """Whether one more group may start. No group starts that the run can never train.

        >>> gate = Gate(groups_per_step=4, max_staleness=1, steps=9)
        >>> [gate.may_admit(admitted=n, dropped=0, live_step=0) for n in (7, 8)]
        [True, False]
        """
        horizon = min(live_step + 1 + self.max_staleness, self.steps)
        return admitted - dropped < horizon * self.groups_per_step

    def may_take(self, *, rank: int, oldest_rank: int, step: int) -> bool:
        """Whether the group of this rank may be trained in the step after version `step`."""
        return rank < (step + 1) * self.groups_per_step or rank < oldest_rank + self.look_ahead
