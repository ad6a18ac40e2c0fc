"""Trains InternVL-nano and writes its checkpoint: `python -m examples.nano.train --help`."""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from examples.nano.accuracy import measure
from examples.nano.batches import BatchMaker, BatchSource, Recipe
from examples.nano.card import TRAINING_FILE, write_card
from examples.nano.checkpoint import SHAPES, config_of, write_description, write_weights
from examples.nano.growth import grown
from examples.nano.model import Nano
from examples.nano.training import Plan, StateMismatch, Trainer
from examples.nano.world import FULL, held_out
from shared.checkpoint import read_config

DEFAULT_OUT = Path(__file__).parent / "internvl-nano"
DEFAULT_STATE = Path.home() / ".cache" / "internvl-nano" / "state.safetensors"
# Seeds that no training may use.
ROLLING_SEED, FINAL_SEED = 990_001, 424_242


@dataclass(frozen=True, slots=True)
class Reporting:
    """How often something is said, measured and saved, in seconds, and on how many questions it is measured."""

    line_s: float = 30.0
    measure_s: float = 300.0
    rolling_questions: int = 320


class Run:
    """One training in this process: steps, progress lines, measurements, saved states."""

    def __init__(self, trainer: Trainer, recipe: Recipe, state: Path, reporting: Reporting) -> None:
        self._trainer, self._recipe, self._state, self._reporting = trainer, recipe, state, reporting
        self._maker = BatchMaker(recipe)
        self._loss = 0.0
        self.stop_requested = False
        self._accuracy = ""
        self._began = time.monotonic()
        self._seconds_before = trainer.progress.seconds
        self._begun_with = (trainer.progress.situations, trainer.progress.answers)
        self._last_line = self._last_measurement = self._began

    def train(self, num_workers: int) -> None:
        """Learn until the plan is done or `stop_requested` is set; the state is saved at every measurement and then."""
        progress, plan = self._trainer.progress, self._trainer.plan
        with BatchSource(self._recipe, progress.step, num_workers) as source:
            batches = iter(source)
            while progress.fraction(plan) < 1 and not self.stop_requested:
                batch = next(batches)
                loss = self._trainer.step(batch)
                self._take(loss if batch.situations else None)
        if not self.stop_requested:
            self._measure()
        self._trainer.save(self._state)

    def _take(self, loss: float | None) -> None:
        """Note a step's loss, None where nothing was said, and say, measure and save what is due."""
        now = time.monotonic()
        progress = self._trainer.progress
        progress.seconds = self._seconds_before + now - self._began
        if loss is not None:
            self._loss = 0.98 * self._loss + 0.02 * loss if self._loss else loss
        if now - self._last_line >= self._reporting.line_s:
            self._last_line = now
            print(self._line(), flush=True)
        if now - self._last_measurement >= self._reporting.measure_s:
            if progress.situations:
                self._measure()
            self._trainer.save(self._state)
            self._last_measurement = time.monotonic()

    def _measure(self) -> None:
        progress = self._trainer.progress
        situations = held_out(ROLLING_SEED, self._reporting.rolling_questions, FULL)
        tally = measure(self._trainer.averaged(), self._maker, situations, max_boxes=8)
        self._accuracy = " ".join(f"{kind}={share:.2f}" for kind, share in tally.by_kind().items())
        progress.history.append(
            {
                "step": progress.step,
                "situations": progress.situations,
                "answers": progress.answers,
                "seconds": round(progress.seconds),
                "loss": round(self._loss, 4),
                "overall": round(tally.overall, 4),
                "iou": round(tally.mean_overlap, 4),
                "kinds": {kind: round(share, 3) for kind, share in tally.by_kind().items()},
            }
        )
        print(f"  accuracy {tally.overall:.3f}, box overlap {tally.mean_overlap:.2f}; {self._accuracy}", flush=True)

    def _line(self) -> str:
        progress, plan = self._trainer.progress, self._trainer.plan
        here = max(1e-9, time.monotonic() - self._began)
        situations, answers = progress.situations - self._begun_with[0], progress.answers - self._begun_with[1]
        done = progress.fraction(plan)
        left = progress.seconds * (1 - done) / max(done, 1e-9)
        return (
            f"{done:6.1%}  step {progress.step}  loss {self._loss:.4f}  "
            f"seeing {self._trainer.seeing_loss:.3f}  "
            f"{situations / here:.1f} situations/s  {answers / here:.0f} answers/s  "
            f"{progress.situations} situations  {_clock(progress.seconds)} done  {_clock(left)} left"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    chosen = _parser().parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if chosen.device == "auto" else chosen.device
    )
    if not (chosen.resume or chosen.export_only) or not (chosen.out / "config.json").is_file():
        write_description(chosen.out, SHAPES[chosen.grow or chosen.shape])
    try:
        trainer = _trainer(chosen, device)
    except StateMismatch as error:
        print(error, file=sys.stderr)
        return 2
    recipe = Recipe(
        chosen.out,
        chosen.seed,
        chosen.batch,
        chosen.max_tokens,
        chosen.easy,
        chosen.seeing,
        answering_from=chosen.steps - chosen.answering if chosen.steps else sys.maxsize,
    )
    run = Run(
        trainer,
        recipe,
        chosen.state,
        Reporting(measure_s=60 * chosen.measure_minutes, rolling_questions=chosen.rolling),
    )
    if not chosen.export_only:
        stop_on_signals(run)
        run.train(chosen.workers)
    if run.stop_requested:
        print(f"Stopped. Go on with --resume; the state is in {chosen.state}.", flush=True)
        return 130
    _export(trainer, recipe, chosen)
    return 0


def _trainer(chosen: argparse.Namespace, device: torch.device) -> Trainer:
    tokenizer = hashlib.sha256((chosen.out / "vocab.json").read_bytes()).hexdigest()[:12]
    identity = (
        f"shape={'>'.join(filter(None, (chosen.shape, chosen.grow)))} seed={chosen.seed} batch={chosen.batch} "
        f"max_tokens={chosen.max_tokens} "
        f"seeing={chosen.seeing} easy={chosen.easy} "
        f"tokenizer={tokenizer}"
    )
    plan = Plan(
        steps=chosen.steps,
        seconds=None if chosen.steps else 3600 * chosen.hours,
        learning_rate=chosen.learning_rate,
        answering_steps=chosen.answering,
    )
    last = read_config(chosen.out)
    first = config_of(chosen.out, SHAPES[chosen.shape]) if chosen.grow else last
    trainer = Trainer(
        Nano.of(first, chosen.seed),
        plan,
        device,
        _precision(chosen.precision, device),
        identity,
        grow=(lambda small: grown(small.cpu(), Nano.of(last, chosen.seed + 1))) if chosen.grow else None,
        compiles=_compiles(device) if chosen.compile is None else chosen.compile,
    )
    if chosen.resume or chosen.export_only:
        trainer.load(chosen.state)
    elif chosen.state.exists():
        raise StateMismatch(f"{chosen.state} holds a training: go on with --resume, or remove it.")
    return trainer


def _export(trainer: Trainer, recipe: Recipe, chosen: argparse.Namespace) -> None:
    """Write weights, training record and model card."""
    averaged = trainer.averaged()
    write_weights(chosen.out, averaged)
    print("Measuring on questions that were never trained on ...", flush=True)
    tally = measure(averaged, BatchMaker(recipe), held_out(FINAL_SEED, chosen.final))
    record = _record(trainer, chosen) | {"in_process": tally.as_json()}
    (chosen.out / TRAINING_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_card(chosen.out)
    print(f"accuracy {tally.overall:.3f}, box overlap {tally.mean_overlap:.3f}; the checkpoint is in {chosen.out}")


def _record(trainer: Trainer, chosen: argparse.Namespace) -> dict[str, Any]:
    progress = trainer.progress
    return {
        "shape": chosen.shape,
        "grow": chosen.grow,
        "seed": chosen.seed,
        "held_out_seed": FINAL_SEED,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": progress.step,
        "skipped_steps": progress.skipped_steps,
        "situations": progress.situations,
        "answers": progress.answers,
        "hours": round(progress.seconds / 3600, 3),
        "batch": chosen.batch,
        "seeing": chosen.seeing,
        "easy": chosen.easy,
        "answering": chosen.answering,
        "learning_rate": chosen.learning_rate,
        "machine": _machine(chosen.threads),
        "history": progress.history,
    }


def _precision(name: str, device: torch.device) -> torch.dtype:
    """Return the element type of matrix products; bfloat16 is chosen only where the hardware multiplies it."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" or "amx_bf16" in _processor("flags") else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _compiles(device: torch.device) -> bool:
    """Return whether torch can compile here what runs on a CPU, where it pays."""
    return device.type == "cpu" and any(map(shutil.which, ("g++", "c++", "clang++")))


def _machine(threads: int) -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{threads} threads of {_processor('model name') or platform.machine()}, torch {torch.__version__}"


def _processor(fact: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fact)), "")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def stop_on_signals(run: Run) -> None:
    """Have the first Ctrl-C or termination end the training after its step; the next one ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.stop_requested = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--hours", type=float, default=10.0, help="train this long (default 10), earlier runs included")
    length.add_argument("--steps", type=int, help="train this many steps instead; the same everywhere, however fast")
    add("--out", type=Path, default=DEFAULT_OUT, help="checkpoint directory to write")
    add("--state", type=Path, default=DEFAULT_STATE, help="file that --resume goes on from")
    add("--resume", action="store_true", help="go on from the state file")
    add("--export-only", action="store_true", help="write the checkpoint from the state file, and do not train")
    add("--shape", choices=sorted(SHAPES), default="base", help="size of the model")
    add("--grow", choices=sorted(SHAPES), help="size of the model in the answering steps; as wide or wider, and deeper")
    add("--seed", type=int, default=1, help="of weights and world")
    add("--threads", type=int, default=os.cpu_count() or 1, help="for the model, besides the workers")
    add("--workers", type=int, default=1, help="processes that draw pictures; 0 draws between the steps")
    add("--batch", type=int, default=16, help="situations of one step")
    add("--max-tokens", type=int, default=224, help="of one row: so many dialogues about its pictures are taken")
    add("--seeing", type=int, default=2500, help="steps on collages, without words, before all else")
    add("--easy", type=int, default=60_000, help="situations until the easy world is left behind")
    add("--answering", type=int, default=0, help="steps of --steps at the end that leave the vision transformer alone")
    add("--learning-rate", type=float, default=1e-3)
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--device", default="auto", help="auto, cpu or cuda")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the layers (default: on a CPU with a compiler)",
    )
    add("--measure-minutes", type=float, default=5.0, help="between measurements, which also save the state")
    add("--rolling", type=int, default=320, help="questions of each measurement")
    add("--final", type=int, default=2000, help="questions of the last measurement")
    return parser


if __name__ == "__main__":
    sys.exit(main())
