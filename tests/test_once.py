"""What one worker has made the other reads; two of them share out several."""

from __future__ import annotations

import threading

import pytest

from tests.once import Once


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> tuple[Once, Once]:
    """Two that have a folder of their own in common."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    made = Once(tmp_path_factory), Once(tmp_path_factory)
    made[0].folder = made[1].folder = tmp_path_factory.mktemp("shared")
    return made


def test_the_second_reads_what_the_first_has_made(workers: tuple[Once, Once]) -> None:
    """The same value, not a second one."""
    values = iter(range(5))
    assert [once("a/name", lambda: next(values)) for once in (*workers, *workers)] == [0] * 4
    assert workers[0]("another", lambda: next(values)) == 1


def test_what_fails_is_made_again(workers: tuple[Once, Once]) -> None:
    with pytest.raises(ZeroDivisionError):
        workers[0]("it", lambda: 1 // 0)
    assert workers[1]("it", lambda: 1) == workers[0]("it", lambda: 2) == 1


def test_who_would_wait_makes_the_next(workers: tuple[Once, Once]) -> None:
    """The first worker is held in `slow` until the second has made `quick`: were it to wait instead, neither would end."""
    asleep, done = threading.Event(), threading.Event()
    made = list[str]()

    def slow() -> str:
        asleep.set()
        assert done.wait(60)
        made.append("slow")
        return "slow"

    def quick() -> str:
        made.append("quick")
        done.set()
        return "quick"

    makes = {"slow": slow, "quick": quick}
    first = threading.Thread(target=workers[0].each, args=(makes,))
    first.start()
    assert asleep.wait(60)
    assert workers[1].each(makes) == {"slow": "slow", "quick": "quick"}
    first.join()
    assert made == ["quick", "slow"]


def test_alone_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    once = Once(tmp_path_factory)
    once.folder = tmp_path_factory.mktemp("alone")
    assert [once("it", lambda: 1), once("it", lambda: 2)] == [1, 1]
    assert not list(once.folder.iterdir())
