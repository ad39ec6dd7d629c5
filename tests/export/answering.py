"""What processes that tests start do. It imports nothing that takes a while."""

import os


def answers(common, tasks):
    for task in tasks:
        if task == "die":
            os._exit(7)
        if task == "refuse":
            raise FileNotFoundError("no such thing")
        yield common + task
