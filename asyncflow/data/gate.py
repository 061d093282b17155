"""The staleness gate: when a group may start, when it may be taken, and why that bounds staleness.

Let P groups make an optimizer step, S be the bound, W the look-ahead, v the trainer's version.

The *rank* of a group is the number of groups admitted before it and not dropped.

**Admission.** A group may start when its rank is below ``(live_version + 1 + S) * P``; for a
new one, that is ``admitted - dropped``.

**Order.** In the step that makes version v + 1, a group may be taken when its rank is below
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

**Resume.** A checkpoint of version w holds w P trained groups and those to issue again, which
are rolled out anew. Let the trained ones be first in line, of ranks below w P, and those to
issue again next, in their order. The proof then holds for the resumed run with *its* S, W and
steps, whatever those before were: a group to issue again passes the same gate, under weights
of version w or later, and the groups that were trained before have ranks below w P <= v P, as
the order rule asks of them. Groups whose rank the gate never admits (fewer steps than before)
stay pending.

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

    def may_admit(self, *, rank: int, live_step: int) -> bool:
        """Whether the group of this rank may start. No group starts that the run can never train.

        >>> gate = Gate(groups_per_step=4, max_staleness=1, steps=9)
        >>> [gate.may_admit(rank=rank, live_step=0) for rank in (7, 8)]
        [True, False]
        """
        horizon = min(live_step + 1 + self.max_staleness, self.steps)
        return rank < horizon * self.groups_per_step

    def rank_limit(self, *, oldest_rank: int, step: int) -> int:
        """Groups of ranks below this may be trained in the step after version `step`.

        >>> gate = Gate(groups_per_step=4, max_staleness=1, steps=9, look_ahead=6)
        >>> gate.rank_limit(oldest_rank=1, step=0), gate.rank_limit(oldest_rank=4, step=0)
        (7, 10)
        """
        return max((step + 1) * self.groups_per_step, oldest_rank + self.look_ahead)

    def last_step(self, rank: int) -> int:
        """The version at which a group of this rank is trained at the latest, by the proof above.

        >>> Gate(groups_per_step=4, max_staleness=1, steps=9).last_step(7)
        1
        """
        return (rank + self.look_ahead - 1) // self.groups_per_step
