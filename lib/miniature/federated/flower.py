"""The bridge to a real system: any method of the engine as a Flower server and client.

The engine's hooks run unchanged: `Method.local_step` and `Method.message` on the clients,
`Method.server_step` on the server, with one run and one client to a tensor. What goes over Flower's
wire are the method's own messages. A client's state stays with it, in Flower's context.
"""

import time
from types import SimpleNamespace

import numpy as np
import torch

from .engine import local_round, per_run
from .participation import Sample
from .robust import mean


def apps(method, objective, theta, *, rounds, steps, seed, active=None, decay=1.0, history=None):
    """Return a Flower ServerApp and ClientApp that follow the engine's trajectory.

    Parameters
    ----------
    method : Method
    objective : Quadratics, Classification or alike
        Of one run. In a deployment, each client's process builds its own.
    theta : torch.Tensor, shape [1, P]
        Initial model.
    rounds, steps : int
    seed : int
        Draws clients and batches as `federate` does with ``seeds=[seed]``.
    active : int, optional
        Clients a round. Default: all.
    decay : float
        Factor on the local learning rate after each round.
    history : list, optional
        Gets the model [1, P] after each round.

    Returns
    -------
    flwr.serverapp.ServerApp, flwr.clientapp.ClientApp

    Raises
    ------
    ModuleNotFoundError
        If Flower is not installed: ``pip install "flwr[simulation]"``.
    """
    try:
        from flwr.clientapp import ClientApp
        from flwr.common import Array, ArrayRecord, ConfigRecord, Message, RecordDict
        from flwr.serverapp import ServerApp
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            'the bridge to Flower needs it: pip install "flwr[simulation]"', name=e.name
        ) from None
    n = objective.n_clients
    client_app, server_app = ClientApp(), ServerApp()

    def record(tensors):
        return ArrayRecord({k: Array(v.cpu().numpy()) for k, v in tensors.items()})

    def tensors(arrays):
        return {k: torch.from_numpy(a.numpy().copy()).to(theta) for k, a in arrays.items()}

    @client_app.train()
    def train(message, context):
        i, t = int(context.node_config["partition-id"]), int(message.content["config"]["t"])
        received = tensors(message.content["arrays"])
        if "client" in context.state:
            state = tensors(context.state["client"])
        else:
            state = method.client_state(theta.new_zeros(1, n, theta.shape[1]))
            state = {k: v[:, i : i + 1] for k, v in state.items()}
        one = torch.ones(1, 1, dtype=torch.bool, device=theta.device)
        c = SimpleNamespace(
            x0=received.pop("theta")[:, None],
            client=state,
            server=received,
            lr=per_run(method.lr, theta[:, None]) * decay**t,
            K=steps,
            t=t,
            active=torch.full((1, 1), i, device=theta.device),
            present=one,
            age=torch.zeros(1, 1, dtype=torch.long, device=theta.device),
            n_clients=n,
            seeds=[seed],
            send=lambda v: v,
        )
        c.full_grad = lambda x: objective.full_grad(x, c.active)
        x = local_round(method, objective, c, steps, [seed])
        sent = method.message(x, c)
        context.state["client"] = record(c.client)
        return Message(content=RecordDict({"arrays": record(sent)}), reply_to=message)

    @server_app.main()
    def main(grid, context):
        while len(nodes := sorted(grid.get_node_ids())) < n:
            time.sleep(0.05)
        node_of = _partitions(grid, nodes, Message, RecordDict, ConfigRecord)
        model, who = theta.clone(), Sample(active or n)
        generators = [np.random.default_rng([seed, 0])]
        c = SimpleNamespace(
            server=method.server_state(torch.zeros_like(model)), n_clients=n, K=steps, seeds=[seed]
        )
        for c.t in range(rounds):
            chosen = np.flatnonzero(who(generators, n, c.t)[0])
            public = {"theta": model} | {k: c.server[k] for k in method.downloads}
            replies = grid.send_and_receive(
                [
                    Message(
                        content=RecordDict(
                            {"arrays": record(public), "config": ConfigRecord({"t": c.t})}
                        ),
                        dst_node_id=node_of[i],
                        message_type="train",
                        group_id=str(c.t),
                    )
                    for i in chosen
                ]
            )
            by_node = {r.metadata.src_node_id: tensors(r.content["arrays"]) for r in replies}
            parts = [by_node[node_of[i]] for i in chosen]
            sent = {k: torch.cat([p[k] for p in parts], dim=1) for k in parts[0]}
            c.active = torch.from_numpy(chosen)[None].to(model.device)
            c.present = torch.ones_like(c.active, dtype=torch.bool)
            c.age = torch.zeros_like(c.active)
            c.x0 = model[:, None].expand(1, len(chosen), -1)
            c.lr = per_run(method.lr, c.x0) * decay**c.t
            c.mean = lambda v: mean(v, c.present)
            c.sum = lambda v: v.sum(1)
            model = method.server_step(model, sent, c)
            if history is not None:
                history.append(model.clone())

    @client_app.query()
    def who_am_i(message, context):
        answer = ConfigRecord({"partition": int(context.node_config["partition-id"])})
        return Message(content=RecordDict({"config": answer}), reply_to=message)

    return server_app, client_app


def _partitions(grid, nodes, Message, RecordDict, ConfigRecord):
    """Ask every node which client it is."""
    ask = [
        Message(content=RecordDict({"config": ConfigRecord()}), dst_node_id=i, message_type="query")
        for i in nodes
    ]
    replies = grid.send_and_receive(ask)
    return {int(r.content["config"]["partition"]): r.metadata.src_node_id for r in replies}
