"""What every test shares: no hub, no user's MLflow store, a named reason where a GPU is absent."""

import os
from collections.abc import Iterator

import pytest
import torch

# Before any test imports them: nothing here may ask a network for weights or report use.
os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", MPLBACKEND="Agg")
os.environ.update(DO_NOT_TRACK="true", MLFLOW_DISABLE_TELEMETRY="true")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One local Ray for every test that uses a pool: starting one takes seconds."""
    import ray

    from fewstep.search.cluster import start_local

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("ray")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        start_local(2)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that wants a tracking server names it; the user's own is never written to."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Tests pass generators; what still draws from the global one is the same in every run."""
    torch.manual_seed(0)
