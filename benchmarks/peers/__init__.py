"""Other libraries beside ours, as data: each module of this folder tells of one or two that may be installed."""

from . import brevitas, inductor, modelopt, onnxruntime
from .base import Peer

__all__ = ["PEERS", "Peer", "found"]

PEERS: tuple[Peer, ...] = (*modelopt.PEERS, *brevitas.PEERS, *onnxruntime.PEERS, *inductor.PEERS)


def found(quick: bool = False) -> dict[str, dict[str, Peer | str]]:
    """Each task's peers by name; a text for one that takes no part."""
    tasks: dict[str, dict[str, Peer | str]] = {peer.task: {} for peer in PEERS}
    for peer in PEERS:
        tasks[peer.task][peer.name] = _place(peer, quick)
    return tasks


def _place(peer: Peer, quick: bool) -> Peer | str:
    if peer.missing:
        return "not installed"
    return "not run (compiles)" if quick and peer.slow else peer
