"""Runs a service the way a container does and asks for its health: `python contained.py MODULE FLAG...`.

To be started in namespaces of its own, where nothing but temporary files can be written and loopback is all there is.
Prints one JSON line: what the service answered, whether the root could be written to, and how it left.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main() -> int:
    address_file = Path(tempfile.gettempdir()) / "health"
    command = [sys.executable, "-m", *sys.argv[1:], "--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, "--health-address-file", str(address_file)], stdout=sys.stderr)
    while process.poll() is None and not address_file.exists():
        time.sleep(0.05)
    answers = {} if process.poll() is not None else asked(address_file.read_text())
    process.send_signal(signal.SIGTERM)
    facts = {
        "health": answers,
        "exit_code": process.wait(30),
        "user": os.getuid(),
        "can_write": can_write(Path(sys.prefix)),
        "has_network": has_network(),
    }
    print(json.dumps(facts))
    return 0


def asked(address: str) -> dict[str, str]:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return {
            name: health_pb2.HealthCheckResponse.ServingStatus.Name(
                stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20, wait_for_ready=True).status
            )
            for name in ("startup", "readiness", "liveness")
        }


def can_write(folder: Path) -> bool:
    try:
        (folder / "written").touch()
    except OSError:
        return False
    return True


def has_network() -> bool:
    return any(name != "lo" for _, name in socket.if_nameindex())


if __name__ == "__main__":
    sys.exit(main())
