"""The bridge to Flower gives the engine's trajectory, over Flower's own messages."""

import pytest
import torch

from miniature.federated.baselines import FedAvg, Scaffold
from miniature.federated.engine import federate
from miniature.federated.flower import apps
from miniature.federated.objectives import Quadratics


def test_without_flower_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "flwr.clientapp", None)
    q = Quadratics.random([0], 3, 4)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "flwr\[simulation\]"'):
        apps(FedAvg(0.1), q, torch.zeros(1, 4), rounds=1, steps=1, seed=0)


def test_a_few_rounds_follow_the_engine():
    pytest.importorskip("flwr", reason="Flower is not installed")
    pytest.importorskip("ray", reason="Flower's simulation engine is not installed")
    from flwr.simulation import run_simulation

    # SCAFFOLD exercises all of the bridge: client state, two messages, two downloads.
    q, method = Quadratics.random([3], 4, 6), Scaffold(0.1)
    theta, history = torch.zeros(1, 6, dtype=torch.float64), []
    server, client = apps(method, q, theta, rounds=3, steps=5, seed=3, active=3, history=history)
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=4,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    ours = federate(method, q, theta, rounds=3, steps=5, seeds=[3], active=3, metric=lambda x: x)
    torch.testing.assert_close(torch.stack(history, 1), ours.metric, atol=1e-13, rtol=0)
