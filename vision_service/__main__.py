"""`python -m vision_service --model DIR`: serves one checkpoint's vision tower until SIGTERM."""

from shared.rpc.server import run
from vision_service.settings import VisionSettings


def main() -> None:
    """Read the settings and serve."""
    settings = VisionSettings.from_command_line("vision_service")
    # torch is imported only after the settings have been read, so that `--help` and a mistyped flag answer at once.
    from vision_service.app import lifespan

    run(settings, "vision", lifespan)


if __name__ == "__main__":
    main()
