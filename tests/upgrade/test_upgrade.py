"""This version beside the one before it, as while a rollout goes on: either's gateway with the other's stages."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.local.process import ChildProcess
from deploy.local.valkey import LocalValkey
from internvl_client import CacheTier, Client, GenerationConfig, Image, InternVLError
from tests.e2e.golden_cases import checkpoint_directory
from tests.golden_cases import CHECKPOINTS, GOLDEN

ROOT = Path(__file__).parents[2]
PREVIOUS = "v0.1.0"
PICTURE, QUESTION, CONFIG = (
    GOLDEN / "images" / "rgb_landscape.png",
    "What is it?",
    GenerationConfig(max_output_tokens=12),
)


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)


pytestmark = pytest.mark.skipif(
    git("cat-file", "-e", f"{PREVIOUS}^{{commit}}").returncode != 0,
    reason=f"the tag {PREVIOUS}, whose services are run beside these, is not in this clone: git fetch --tags",
)


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the version before."""
    folder = tmp_path_factory.mktemp("previous")
    archive = git(
        "archive", PREVIOUS, "gateway", "vision_service", "llm_service", "shared", "protos", "internvl_client"
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


@dataclass
class Versions:
    """Starts services of either version over one Valkey."""

    trees: dict[str, Path]
    folder: Path
    valkey: LocalValkey
    stack: ExitStack
    count: int = field(default=0)

    def start(self, version: str, module: str, *flags: str) -> str:
        """Start a service; return where it listens."""
        self.count += 1
        tree, address_file = self.trees[version], self.folder / f"{self.count}.address"
        name = module.partition("_")[0].upper()
        environment = {
            "PYTHONPATH": f"{tree}:{tree}/protos/gen",
            "PYTHONSAFEPATH": "1",  # or the folder that the tests run in would come first
            f"{name}_REDIS_URL": self.valkey.url(1 if module == "gateway" else 0),
        }
        if module != "gateway":
            environment[f"{name}_EMBEDDING_KEY"] = "the same for both"
            flags = ("--model", str(checkpoint_directory(CHECKPOINTS[0])), "--dtype", "float32", *flags)
        command = [sys.executable, "-m", module, "--listen", "127.0.0.1:0", "--address-file", str(address_file), *flags]
        process = ChildProcess(module, command, environment, self.folder / f"{self.count}.log")
        self.stack.callback(process.stop, 10)
        wait(lambda: address_file.exists() and is_ready(address_file.read_text()), process)
        return address_file.read_text()

    def stages(self, version: str) -> tuple[str, str]:
        """Start a vision and an LLM service; return where they listen."""
        return self.start(version, "vision_service"), self.start(version, "llm_service")

    def gateway(self, version: str, stages: tuple[str, str]) -> Client:
        """Start a gateway before some stages and return its client."""
        address = self.start(version, "gateway", "--vision-target", stages[0], "--llm-target", stages[1])
        return self.stack.enter_context(Client(address, timeout_s=60))


def is_ready(address: str) -> bool:
    with Client(address) as client:
        try:
            return client.is_ready(timeout_s=2)
        except InternVLError:
            return False


def wait(condition: Callable[[], bool], process: ChildProcess) -> None:
    while not condition():
        assert process.exit_code is None, process.last_lines(20)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def versions(previous: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Versions]:
    folder = tmp_path_factory.mktemp("versions")
    with ExitStack() as stack:
        valkey = LocalValkey(folder)
        stack.callback(valkey.process.kill)
        yield Versions({"previous": previous, "this": ROOT}, folder, valkey, stack)


@pytest.fixture(scope="module")
def stages(versions: Versions) -> dict[str, tuple[str, str]]:
    return {version: versions.stages(version) for version in versions.trees}


def test_messages_only_grow(previous: Path) -> None:
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run(
        [buf, "breaking", ROOT / "protos", "--against", previous / "protos"],
        capture_output=True,
        text=True,
        env=os.environ | {"PWD": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.e2e
@pytest.mark.parametrize(("of_gateway", "of_stages"), [("previous", "this"), ("this", "previous")])
def test_a_gateway_works_with_stages_of_the_other_version(
    versions: Versions, stages: dict[str, tuple[str, str]], of_gateway: str, of_stages: str
) -> None:
    own = versions.gateway(of_stages, stages[of_stages]).ask(Image.open(PICTURE), QUESTION, config=CONFIG)
    client = versions.gateway(of_gateway, stages[of_stages])
    assert client.ask(Image.open(PICTURE), QUESTION, config=CONFIG).text == own.text
    conversation = client.create_conversation()
    conversation.ask(Image.open(PICTURE), QUESTION, config=CONFIG)
    assert conversation.ask("And now?", config=CONFIG).text


@pytest.mark.e2e
def test_embeddings_of_the_previous_version_are_used_by_this_one(
    versions: Versions, stages: dict[str, tuple[str, str]]
) -> None:
    picture = Image.open(GOLDEN / "images" / "rgb_portrait.png")
    before = versions.gateway("previous", stages["previous"]).ask(picture, QUESTION, config=CONFIG)
    after = versions.gateway("this", stages["this"]).ask(picture, QUESTION, config=CONFIG)
    assert before.receipts[0].cache_tier is CacheTier.NONE
    assert after.receipts[0].cache_tier is CacheTier.STORE
    assert after.text == before.text


@pytest.mark.e2e
def test_a_conversation_goes_on_through_an_upgrade_and_back(
    versions: Versions, stages: dict[str, tuple[str, str]]
) -> None:
    old = versions.gateway("previous", stages["previous"])
    new = versions.gateway("this", stages["this"])
    conversation = old.create_conversation()
    conversation.ask(Image.open(PICTURE), QUESTION, config=CONFIG)
    new.conversation(conversation.conversation_id).ask("And now?", config=CONFIG)
    old.conversation(conversation.conversation_id).ask("And then?", config=CONFIG)
    assert len(list(new.conversation(conversation.conversation_id).messages())) == 6
