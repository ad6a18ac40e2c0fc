"""`python -m gateway`: the gateway as a process."""

from gateway.app import lifespan
from gateway.settings import GatewaySettings
from shared.rpc.server import run

if __name__ == "__main__":
    run(GatewaySettings.from_command_line("gateway"), "gateway", lifespan)
