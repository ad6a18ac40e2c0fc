"""Runs one peer by itself, for whoever wants to ask it by hand."""

import time
from pathlib import Path

from benchmarks.peers.environment import say
from benchmarks.peers.peer import Peer, PeerError


def serve_until_interrupted(peer: Peer, checkpoint: Path | None) -> None:
    """Start a peer, say where it listens, and stop it at Ctrl-C; raise `PeerError`."""
    if checkpoint is None or not (checkpoint / "config.json").is_file():
        raise PeerError("serve needs --model DIR, a checkpoint; python -m benchmarks.checkpoints writes one.")
    try:
        say(f"starting {peer.name} for {checkpoint}")
        address = peer.start(checkpoint, say)
        say(f"{peer.name} answers at {address}/v1/chat/completions; Ctrl-C ends it")
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        peer.stop()
