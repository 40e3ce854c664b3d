"""Where the training workers of a Ray of this machine alone meet: on loopback, as the rest of it (`pipelines.cluster.loopback`).

PyTorch's store listens on every interface, whatever address it is given, unless it is handed a socket that is bound already.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

from pipelines.cluster.loopback import on_loopback

HOST = "127.0.0.1"
_store: list[Any] = []  # in the worker of rank 0: it answers as long as its process lives


def listen() -> int:
    """In the worker of rank 0: open the store on loopback; its port."""
    with socket.create_server((HOST, 0), backlog=1024) as server:
        port = int(server.getsockname()[1])
        handle = server.detach()  # the store's from now on
    opened = dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=handle)
    _store[:] = [opened]
    return port


def meet(port: int, backend: str, rank: int, world_size: int, timeout_s: int) -> None:
    """In every worker: join the process group over that store. The group's own connections are on loopback too."""
    (interface,) = (name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(HOST, port, world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


class LoopbackBackend(_TorchBackend):
    """Ray Train's for PyTorch, but for where workers meet."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        size, config = len(worker_group), backend_config
        port = worker_group.execute_single(0, listen)
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(rank, meet, port, config.backend, rank, size, config.timeout_s)
                for rank in range(size)
            ]
        )


class LoopbackTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[LoopbackBackend]:
        return LoopbackBackend


def torch_config(backend: str) -> TorchConfig:
    """What a TorchTrainer is to have on this process's Ray. backend: gloo or nccl."""
    return (LoopbackTorchConfig if on_loopback() else TorchConfig)(backend=backend)
