"""The services' code without the services: vision tower and engine called directly, in one process.

A program of its own, driven by `OneProcess`: for every line of JSON on its standard input it answers one question about
one picture, up to the first token, and says how long that took.
"""

import argparse
import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.peers.peer import PeerError, Report
from internvl_client.bench import Question

_READY: Final = "ready"
_LOG_LINES: Final = 8


class OneProcess:
    """The running program. Blocks; not to be shared between threads."""

    def __init__(self, process: subprocess.Popen[str], log_file: Path) -> None:
        self._process = process
        self._log_file = log_file

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, question: Question) -> float:
        """Return the seconds to the first token of the answer; raise `PeerError`."""
        (picture,) = question.pictures
        assert self._process.stdin is not None
        try:
            print(
                json.dumps({"text": question.text, "picture": base64.b64encode(picture).decode()}),
                file=self._process.stdin,
                flush=True,
            )
        except BrokenPipeError:
            raise self._failure() from None
        return float(self.line())

    def line(self) -> str:
        """Return the next line that it says; raise `PeerError` when it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return line.strip()

    def _failure(self) -> PeerError:
        lines = self._log_file.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return PeerError("\n  ".join(["the one process has ended:", *lines]))


@contextmanager
def one_process(model: Path, dtype: str, report: Report) -> Iterator[OneProcess]:
    """Start the program, wait until it has loaded both models, and end it at the end; raise `PeerError`."""
    command = [sys.executable, "-m", "benchmarks.one_process", "--model", str(model), "--dtype", dtype]
    with tempfile.NamedTemporaryFile("w+", prefix="internvl-one-process-", suffix=".log") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            report("starting one process with both models")
            running = OneProcess(process, Path(log.name))
            if (said := running.line()) != _READY:
                raise PeerError(f"the one process said {said!r} where it should be ready.")
            yield running
        finally:
            process.kill()
            process.communicate()


class _Asked:
    """Both models, loaded; answers questions one at a time. The models' code is imported here and nowhere else."""

    def __init__(self, model: Path, dtype: str) -> None:
        from llm_service.app import LoadedModel
        from llm_service.settings import LlmSettings
        from shared.checkpoint import Checkpoint, read_config
        from shared.tensors import resolve_device, resolve_dtype
        from vision_service.model.loader import load_tower
        from vision_service.model.tower import TowerConfig
        from vision_service.preprocess.tiling import TilingSpec
        from vision_service.runner import ModelRunner
        from vision_service.settings import VisionSettings

        self._vision = VisionSettings.model_validate({"model": model, "dtype": dtype})
        config = read_config(model)
        device = resolve_device("cpu")
        self._spec = TilingSpec.of(config, self._vision.image_policy)
        load = partial(load_tower, Checkpoint(model), TowerConfig.of(config), device, resolve_dtype(dtype, device))
        self._tower = ModelRunner(load, max_tiles=self._vision.max_batch_tiles or 1)
        self._model = LoadedModel(LlmSettings.model_validate({"model": model, "dtype": dtype}))
        self._engine = self._model.engine()
        self._writer = self._model.writer()

    async def start(self) -> None:
        """Load the tower and start the engine, on threads of theirs. Within the event loop that will ask."""
        await self._tower.load()
        self._engine.start()

    async def first_token(self, text: str, content: bytes) -> float:
        """Return the seconds from the picture's bytes to the first token of the answer."""
        from llm_service.engine.sequence import EngineRequest, SamplingParams
        from llm_service.prompt.dialogue import Dialogue, EmbeddingRef, Role, TextSegment, Turn, VisualSegment
        from shared.tensors import data_type_of
        from vision_service.preprocess.image import preprocess

        began = time.perf_counter()
        picture = preprocess(content, self._spec, self._vision.max_pixels)
        (rows,) = await self._tower.encode([picture.tiles])  # [visual tokens, hidden]
        digest = hashlib.sha256(content).hexdigest()
        ref = EmbeddingRef(digest, len(picture.tiles), len(rows), rows.shape[1], data_type_of(rows), "")
        dialogue = Dialogue((Turn(Role.USER, (VisualSegment((ref,)), TextSegment(text))),))
        params = SamplingParams(max_output_tokens=1)
        request = EngineRequest(self._writer.write(dialogue), (rows.to(self._model.facts().dtype),), params)
        async for _ in self._engine.generate(request):
            break
        return time.perf_counter() - began


async def _answer_lines(model: Path, dtype: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is said goes to the log
    asked = _Asked(model, dtype)
    await asked.start()
    print(_READY, file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        question = json.loads(line)
        seconds = await asked.first_token(question["text"], base64.b64decode(question["picture"]))
        print(seconds, file=answers, flush=True)


def main() -> None:
    """Answer what comes on standard input, until it ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_process", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    asyncio.run(_answer_lines(arguments.model, arguments.dtype))


if __name__ == "__main__":
    main()
