"""`python -m vision_service.workers.worker SETTINGS`: answers the tasks that come on its standard input, one by one.

A process of its own, because decoders are large programs in C that read what strangers send: one that crashes, hangs or
wants too much memory ends here. It inherits no secrets, reaches nothing but the service, and ends with it.
"""

import socket
import sys

from vision_service.workers import answers, confinement
from vision_service.workers.channel import Channel
from vision_service.workers.settings import WorkerSettings


def main() -> None:
    """Answer requests until there are no more."""
    settings = WorkerSettings.from_json(sys.argv[1])
    channel = Channel(socket.socket(fileno=sys.stdin.fileno()))
    confinement.die_with_parent()
    confinement.limit_memory(settings.memory_bytes)
    answers.load(settings.work)
    channel.send({"locked": confinement.lock()})
    while True:
        try:
            request, content = channel.receive()
        except EOFError:
            return
        channel.send(*answers.answer(settings.work, request, bytes(content)))


if __name__ == "__main__":
    main()
