"""Names for runs that nobody named: a date and two words that are easy to say and to type."""

from __future__ import annotations

from collections.abc import Iterator

from asyncflow.core.world import World

ADJECTIVES = (
    "able amber apt avid bold brave brisk blue calm clear clever coral crisp dapper deft eager early fair fine fond "
    "free fresh gentle glad gold grand green happy hardy jade jolly keen kind light lively loyal lucid lucky mellow "
    "merry mild neat nimble noble olive patient plucky polite proud quick quiet rapid ready red robust rosy royal "
    "sage serene sharp shiny silver sleek smart snug solid spry steady sunny swift teal tidy vivid warm wise witty"
)
ANIMALS = (
    "adder ant badger bat bear beaver bee bison boar camel cat cod crab crane crow deer dingo dove duck eagle eel "
    "egret elk emu falcon ferret finch fox frog gecko gnu goat goose gull hare hawk heron horse ibex ibis jackal jay "
    "kestrel kiwi koala lark lemur lion lizard llama loon lynx marten mole moose moth newt ocelot orca otter owl panda "
    "pigeon pike puffin puma quail rabbit raven robin salmon seal shrew skua sloth snail stork swan tapir tern tiger "
    "toad trout vole walrus wasp weasel whale wolf wombat wren yak zebra"
)


def invent_names(world: World) -> Iterator[str]:
    """Names to try in this order, such as `2026-11-20-blue-fox`; the same for equal worlds."""
    rng = world.rng("run name")
    date = world.wall_clock().date().isoformat()
    while True:
        yield f"{date}-{rng.choice(ADJECTIVES.split())}-{rng.choice(ANIMALS.split())}"
