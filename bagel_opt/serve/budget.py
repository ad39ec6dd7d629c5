"""Memory that requests share."""

import asyncio
from collections import deque


class Budget:
    """So many bytes for all. Who wants more than are left waits; first come, first served."""

    def __init__(self, total: int):
        self.left = total
        self.waiting: deque[tuple[int, asyncio.Future]] = deque()

    async def take(self, amount: int) -> None:
        if amount <= self.left and not self.waiting:
            self.left -= amount
            return
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            self.give(0 if turn.cancelled() else amount)  # it may have been granted just before
            raise

    def give(self, amount: int) -> None:
        self.left += amount
        while self.waiting and (self.waiting[0][1].done() or self.waiting[0][0] <= self.left):
            wanted, turn = self.waiting.popleft()
            if not turn.done():
                self.left -= wanted
                turn.set_result(None)
