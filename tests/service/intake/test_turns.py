"""Turns: who is next, and nothing is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from service.intake.turns import Turns

pytestmark = pytest.mark.alone


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


async def order_of(turns: Turns[str], *callers: str, charge: float = 1.0) -> str:
    """The order in which callers get the only thing, which each puts back at once."""
    order = ""

    async def take(caller: str) -> None:
        nonlocal order
        thing = await turns.take(caller, charge)
        order += caller
        await asyncio.sleep(0)
        turns.put(thing)

    await asyncio.gather(*(take(caller) for caller in callers))
    return order


@in_loop
async def test_callers_take_turns_and_equal_ones_keep_their_order() -> None:
    turns: Turns[str] = Turns()
    turns.put("thing")
    assert await order_of(turns, *"aaaabbc") == "abcabaa"


@in_loop
async def test_who_was_refunded_less_waits_longer() -> None:
    turns: Turns[str] = Turns()
    turns.put("thing")
    await turns.take("costly", 2.0)
    waiting = asyncio.create_task(order_of(turns, *"xxx", "costly", charge=0.1))
    await asyncio.sleep(0.01)
    turns.put("thing")
    assert await waiting == "xxxcostly"
    turns.refund("costly", 2.0)
    assert await order_of(turns, "x", "costly", "x") == "xcostlyx"


@in_loop
async def test_nobody_gains_by_having_been_idle() -> None:
    turns: Turns[str] = Turns()
    turns.put("thing")
    await order_of(turns, *"aaaaaa")
    assert await order_of(turns, *"aabbbb") == "ababbb"


@in_loop
async def test_who_leaves_loses_nothing_for_others() -> None:
    turns: Turns[str] = Turns()
    waiting = [asyncio.create_task(turns.take("a", 1.0)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # while it waits
    await asyncio.sleep(0)
    turns.put("thing")
    waiting[1].cancel()  # when it has just been given the thing
    assert await waiting[2] == "thing"
    turns.put("thing")
    assert await turns.take("b", 1.0) == "thing"


@in_loop
async def test_an_error_ends_all_waiting_and_no_later_one() -> None:
    turns: Turns[str] = Turns()
    waiting = [asyncio.create_task(turns.take(caller, 1.0)) for caller in "ab"]
    await asyncio.sleep(0)
    turns.fail(RuntimeError())
    for one in waiting:
        with pytest.raises(RuntimeError):
            await one
    turns.put("thing")
    assert await turns.take("a", 1.0) == "thing"
