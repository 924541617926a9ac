from __future__ import annotations

import asyncio
import threading

from groundling.serving.mailbox import Mailbox


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts how often other threads have woken it."""

    n_woken = 0

    def call_soon_threadsafe(self, *arguments, **options):  # type: ignore[no-untyped-def]
        self.n_woken += 1
        return super().call_soon_threadsafe(*arguments, **options)


def test_what_is_posted_is_delivered_once_and_in_order() -> None:
    async def receive() -> list[int]:
        mailbox, heard = Mailbox(), asyncio.Queue[int]()
        loop = asyncio.get_running_loop()

        def post() -> None:
            for number in range(10_000):
                mailbox.post(loop, heard.put_nowait, number)

        thread = threading.Thread(target=post)
        thread.start()
        numbers = [await heard.get() for _ in range(10_000)]
        thread.join()
        assert heard.empty()
        return numbers

    assert asyncio.run(receive()) == list(range(10_000))


def test_a_sleeping_loop_is_woken_once() -> None:
    async def receive() -> None:
        mailbox, heard = Mailbox(), asyncio.Queue[int]()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        for _ in range(2):
            before = loop.n_woken
            for number in range(16):  # the loop cannot run between two of these
                mailbox.post(loop, heard.put_nowait, number)
            assert [await heard.get() for _ in range(16)] == list(range(16))
            assert loop.n_woken == before + 1

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(receive())
