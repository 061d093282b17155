"""Steps taken again from the log: the same micro-batches in the same order, without a rollout.

From a checkpoint, the steps that the log holds after it lead to the same losses and the same
weights: bit for bit where the training engine is deterministic, and on the same number of
threads. A resumed run does this, and `asyncflow replay`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from asyncflow.core.ports import Loss, TensorT, TrainEngine
from asyncflow.core.types import StepReport
from asyncflow.data.history import History


async def replay_step(
    trainer: TrainEngine[TensorT],
    loss: Loss[TensorT],
    history: History,
    step: int,
    columns: Sequence[str],
    use_threads: Callable[[int], None] | None = None,
) -> StepReport:
    """Take the step that made version `step`, as the log holds it; the trainer must be at the version before.

    `use_threads` hears, before each call of the trainer, how many CPU threads computed it (0: nobody
    knows). Raises `RunFolderError` where the log does not hold the step's rows any more.
    """
    if trainer.version.step != step - 1:
        raise ValueError(f"step {step} can't be taken by a trainer at version {trainer.version.step}")
    threads = history.steps[step].threads
    denominator = 0.0
    for place, batch in enumerate(history.micro_batches(step, columns)):
        denominator += loss.denominator(batch)
        if use_threads is not None:
            use_threads(threads[place] if threads else 0)
        await trainer.accumulate(batch, loss)
    if use_threads is not None:
        use_threads(threads[-1] if threads else 0)
    return await trainer.apply(denominator)


async def catch_up(
    trainer: TrainEngine[TensorT],
    loss: Loss[TensorT],
    history: History,
    columns: Sequence[str],
    publish: Callable[[], Awaitable[None]],
    after_step: Callable[[StepReport], None],
    use_threads: Callable[[int], None] | None,
) -> None:
    """Take all steps that the log holds after the trainer's version.

    On the way, the weights that were live when the log ended are published: rollouts that were not
    finished then belong to them.
    """
    last_live = max(history.live, default=-1)
    for step in range(trainer.version.step, history.last_step + 1):
        if step > trainer.version.step:
            after_step(await replay_step(trainer, loss, history, step, columns, use_threads))
        if step == last_live and step < history.last_step:
            await publish()
