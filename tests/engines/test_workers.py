"""Processes that evaluate numbered tasks: order, errors, deaths."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from pgcheck.engines.workers import Workers


def in_order(workers, numbers):
    numbers = iter(numbers)
    given = taken = 0
    found = []
    while True:
        while workers.hungry and (number := next(numbers, None)) is not None:
            workers.give(number)
            given += 1
        if taken == given:
            return found
        found.append(workers.take())
        taken += 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_tasks(count):
    """The first take longest; what is closed over needs no pickling."""
    weight = torch.tensor([2.0, 3.0], dtype=torch.float64)

    def task(number):
        time.sleep(0.02 if number < 2 else 0.0)
        return {"pid": os.getpid(), "value": number * weight}

    with Workers(count, lambda number: task(number)) as workers:
        found = in_order(workers, range(9))
    assert [x["value"].tolist() for x in found] == [[2.0 * i, 3.0 * i] for i in range(9)]
    assert len({x["pid"] for x in found}) == count
    assert os.getpid() not in {x["pid"] for x in found}


def test_tensors_arrive_as_they_are():
    """Of every dtype and shape, strided, empty, and one that is there twice."""
    x = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    sent = [
        x,
        x.T,
        x[:, 1],
        x[0, 0],
        x.to(torch.float32),
        x > 3,
        x.long(),
        torch.zeros(0, 5),
        x,
        {"in": (x.requires_grad_(),)},
    ]
    with Workers(1, lambda number: sent) as workers:
        workers.give(0)
        found = workers.take()
    for here, there in zip(sent[:-1], found[:-1], strict=True):
        assert torch.equal(here, there)
        assert here.dtype == there.dtype
        assert there.data_ptr() % 64 == 0 or there.numel() == 0  # aligned as torch does it
    assert torch.equal(found[-1]["in"][0], x)
    assert found[0] is found[8]


def test_an_error_is_raised_where_the_result_is_taken():
    class Unpicklable(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def task(number):
        if number == 3:
            raise Unpicklable("three", 3)
        return number

    with Workers(2, task) as workers:
        for number in range(4):
            workers.give(number)
        assert [workers.take() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(Unpicklable, match="three"):
            workers.take()


def test_the_work_of_one_that_died_is_done_here():
    with Workers(2, lambda number: (number, os.getpid())) as workers:
        found = in_order(workers, range(4))
        dead = found[1][1]
        os.kill(dead, signal.SIGKILL)
        found += in_order(workers, range(4, 10))
    assert [number for number, _ in found] == list(range(10))
    assert found[-1][1] == os.getpid()
    assert found[-2][1] == found[0][1]


def test_no_worker_outlives_the_process_that_started_it():
    """Killed outright, it cannot tell them; they see the end of their pipe."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def start():
        with Workers(3, lambda number: os.getpid()) as workers:
            theirs.send(in_order(workers, range(3)))
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    children = ours.recv()
    assert len(set(children)) == 3
    process.kill()
    process.join()
    end = time.monotonic() + 30
    while any(alive(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
