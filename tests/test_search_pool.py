"""Ray actors: the same results as one process, whatever dies."""

import os
import time

import pytest
import torch

from fewstep.samplers.streams import cut
from fewstep.search import pool as pool_module
from fewstep.search import preparing
from fewstep.search.config import load_study
from fewstep.search.display import Display
from fewstep.search.pool import RayPool, SerialPool
from fewstep.search.run import search
from fewstep.search.work import Block, Evaluator, Work
from fewstep.space import StudyError
from fewstep.space.baselines import named
from tests.studies import trial_table, write_study

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def _run(pool, evaluator_noise, samples=8, size=4, count=10):
    schedules = list(named(evaluator_noise, 3).values())[:count]
    blocks = []
    for members in cut(schedules, size):
        group = [schedules[i] for i in members]
        blocks += Block.cover(group, "search", range(samples), 4, want="samples")
    return {i: r for i, r in enumerate(pool.map(blocks))}


def _pool(config, workers=2, display=None, **settings):
    search = config.search.model_copy(update={"workers": workers, **settings})
    return RayPool(config.model_copy(update={"search": search}), display=display)


def _setup(tmp_path, **arguments):
    path = write_study(tmp_path)
    config = load_study(path, [f"model.{k}={v}" for k, v in arguments.items()])
    evaluator = Evaluator.of(config)
    return config, SerialPool(evaluator), evaluator.problem.denoiser.noise


def test_workers_give_the_same_numbers_as_one_process(tmp_path):
    config, serial, noise = _setup(tmp_path)
    expected = _run(serial, noise)
    pool = _pool(config)
    try:
        found = _run(pool, noise)
    finally:
        pool.close()
    assert set(found) == set(expected)
    for key, result in found.items():
        assert (result.values == expected[key].values).all()


def test_a_worker_that_dies_is_replaced_and_its_block_done_elsewhere(tmp_path):
    trap = tmp_path / "trap"
    trap.touch()
    config, _, noise = _setup(tmp_path, broken=f"die of {trap}")
    pool = _pool(config, retries=1)
    try:
        found = _run(pool, noise)
    finally:
        pool.close()
    assert not os.path.exists(trap)
    assert all(s == "ok" for r in found.values() for s in r.status)


def test_workers_that_cannot_start_end_the_search_with_their_own_words(tmp_path, monkeypatch):
    class OnABareMachine:
        def __init__(self, config):
            raise ModuleNotFoundError("No module named 'torch'")

        def ready(self):
            return {}

    monkeypatch.setattr(pool_module, "Worker", OnABareMachine)
    config, _, _ = _setup(tmp_path)
    with pytest.raises(StudyError, match=r"not start: ModuleNotFoundError: No module named 'to"):
        _pool(config)


def test_a_block_that_hangs_is_a_status_not_a_hang(tmp_path):
    config, _, noise = _setup(tmp_path, broken="hang")
    pool = _pool(config, timeout=1.0)
    try:
        found = _run(pool, noise, samples=4, size=2, count=2)
    finally:
        pool.close()
    assert {s for r in found.values() for s in r.status} == {"timeout"}


def test_a_search_on_workers_has_the_trial_table_of_one_process(tmp_path):
    study = write_study(tmp_path)
    one = search(load_study(study), tmp_path / "one")
    two = search(load_study(study, ["search.workers=2"]), tmp_path / "two")
    assert trial_table(one.out) == trial_table(two.out)
    assert one.rows == two.rows


def test_a_model_on_a_gpu_has_one_worker_for_each_gpu_unless_it_is_said(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(preparing, "RayPool", lambda config, *rest, **more: made.append(config))
    config, _, _ = _setup(tmp_path)
    evaluator = Evaluator.of(config)
    for device, setting in (("cpu", None), ("cuda", None), ("cuda", 4)):
        evaluator.device = torch.device(device)
        search = config.search.model_copy(update={"workers": setting})
        config = config.model_copy(update={"search": search})
        preparing.open_pool(config, evaluator, None, Display())
    assert [(c.search.workers, c.search.gpus) for c in made] == [(None, 0), (None, 1), (4, 0)]


def test_workers_ask_in_pieces_of_the_size_that_one_of_them_found(tmp_path):
    class Piece(Work):
        def run(self, evaluator):
            return evaluator.piece, evaluator.problem.denoiser.piece

    config, _, _ = _setup(tmp_path)
    pool = _pool(config, workers=1)
    try:
        (found,) = pool.map([preparing.Speed(config)])
        assert found[0] > 0
        assert found[1] is None  # on a CPU the loop's own rule holds
        pool.piece = 48
        assert list(pool.map([Piece()])) == [(48, 48)]
    finally:
        pool.close()


def test_workers_get_work_while_the_search_is_busy_elsewhere(tmp_path):
    class Mark(Work):
        def __init__(self, number):
            self.file = tmp_path / f"{number}"

        def run(self, evaluator):
            self.file.touch()
            return self.file.name

    config, _, _ = _setup(tmp_path)
    pool = _pool(config, workers=1)
    try:
        works = [Mark(k) for k in range(5)]
        coming, until = pool.map(works), time.monotonic() + 60
        while not all(work.file.exists() for work in works) and time.monotonic() < until:
            pool.tend()
            time.sleep(0.01)
        assert all(work.file.exists() for work in works)
        assert list(coming) == ["0", "1", "2", "3", "4"]
        pool.tend()  # nothing is on its way
    finally:
        pool.close()


class _Heard(Display):
    """Remembers what it is told of work that has not ended."""

    def __init__(self):
        self.heard = []

    def working(self, evaluations):
        self.heard.append(evaluations)


def test_groups_come_when_they_are_whole_and_long_work_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.search.pool._LOOK", 0.2)
    config, serial, noise = _setup(tmp_path, broken="slow")
    ddim = [next(iter(named(noise, 3).values()))]
    works = {n: Block.cover(ddim, "search", range(4 * n), 4 * n, want="samples") for n in (8, 1)}
    pool = _pool(config, display=(display := _Heard()))
    try:
        found = dict(pool.map_groups(works))
    finally:
        pool.close()
    assert list(found) == [1, 8]  # the second group is smaller
    expected = dict(serial.map_groups(works))
    for n in works:
        assert (found[n][0].values == expected[n][0].values).all()
    assert any(0 < asked <= 3 * 32 for asked in display.heard), display.heard
    assert display.heard[-1] == 0
