"""The native kernel gives oneDNN's numbers bit for bit, whatever the shape; where it cannot be right it is left out."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.few_rows import MOST_ROWS, FewRowsMatrix
from shared.native import build, library
from shared.packed_linear import PackedLinear

ROWS_PACKED_FOR = 16
has_kernel = library.kernels() is not None
needs_kernel = pytest.mark.skipif(not has_kernel, reason="the kernel was not compiled, or this processor has no AMX")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer(num_outputs: int, num_inputs: int, *, bias: bool = False, rows: int = ROWS_PACKED_FOR) -> PackedLinear:
    made = PackedLinear(torch.nn.Parameter(numbers(num_outputs, seed=1)) if bias else None, rows)
    made.hold(numbers(num_outputs, num_inputs, seed=2))
    return made


def by_onednn(packed: PackedLinear, inputs: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    kernel, packed._few_rows = packed._few_rows, None
    try:
        return packed(inputs) if other is None else packed.added(inputs, other)
    finally:
        packed._few_rows = kernel


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, MOST_ROWS),
    num_outputs=st.integers(1, 300),
    num_inputs=st.integers(1, 300) | st.integers(1, 9).map(lambda steps: 32 * steps),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_onednn_bit_for_bit(
    rows: int, num_outputs: int, num_inputs: int, bias: bool, seed: int
) -> None:
    packed = layer(num_outputs, num_inputs, bias=bias)
    inputs, other = numbers(rows, num_inputs, seed=seed), numbers(rows, num_outputs, seed=seed + 1)
    if packed._few_rows is None:  # oneDNN may choose another order for a shape
        return
    pairs = (
        (packed(inputs), by_onednn(packed, inputs)),
        (packed.added(inputs, other), by_onednn(packed, inputs, other)),
    )
    for found, expected in pairs:
        if num_inputs % 32 == 0:
            assert torch.equal(found, expected)
        # What is left of other numbers of inputs oneDNN adds in an order of its own: one product in a thousand lies
        # between two bfloat16 numbers so exactly that it is rounded to the other.
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=2**-7)


@needs_kernel
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1152, 896), (896, 4864), (512, 256)])
def test_the_shapes_of_models_have_the_order_that_the_kernel_reads(num_outputs: int, num_inputs: int) -> None:
    packed = layer(num_outputs, num_inputs, bias=True)
    assert packed._few_rows is not None
    for rows in (1, 15, 16, 17, 31, 32):
        inputs = numbers(rows, num_inputs, seed=rows)
        assert torch.equal(packed(inputs), by_onednn(packed, inputs))


@needs_kernel
def test_a_rows_numbers_do_not_depend_on_its_neighbours() -> None:
    packed = layer(320, 192)
    inputs = numbers(MOST_ROWS, 192)
    together = packed(inputs)
    for row in range(MOST_ROWS):
        assert torch.equal(packed(inputs[row : row + 1])[0], together[row])


@needs_kernel
def test_rows_may_lie_apart() -> None:
    packed = layer(64, 96)
    wide = numbers(5, 200)
    assert torch.equal(packed(wide[:, 40:136]), packed(wide[:, 40:136].contiguous()))


@needs_kernel
def test_numbers_that_are_none_stay_in_their_row() -> None:
    packed = layer(64, 70)  # its last step is padded
    inputs = numbers(3, 70)
    inputs[1] = torch.nan
    outputs = packed(inputs)
    assert outputs[1].isnan().all()
    assert not outputs[[0, 2]].isnan().any()


@needs_kernel
def test_onednn_is_right_after_the_kernel_and_in_between() -> None:
    # Both use the processor's tile registers, in the same threads.
    packed = layer(256, 128)
    inputs, many = numbers(8, 128), numbers(200, 128)
    few_alone, many_alone = packed(inputs), packed(many)
    for _ in range(20):
        assert torch.equal(packed(many), many_alone)
        assert torch.equal(packed(inputs), few_alone)


@needs_kernel
def test_several_threads_may_multiply_at_once() -> None:
    packed = layer(512, 256)
    inputs = numbers(4, 256)
    alone = packed(inputs)
    found: list[bool] = []

    def multiply() -> None:
        found.extend(torch.equal(packed(inputs), alone) for _ in range(50))

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(found)


@needs_kernel
def test_too_many_rows_are_left_to_onednn() -> None:
    packed = layer(64, 64)
    matrix = packed._few_rows
    assert matrix is not None
    assert not matrix.takes(numbers(MOST_ROWS + 1, 64))
    assert not matrix.takes(numbers(0, 64))
    assert packed(numbers(0, 64)).shape == (0, 64)
    assert packed(numbers(2, 3, 64)).shape == (2, 3, 64)


@needs_kernel
def test_a_matrix_in_another_order_is_left_to_onednn() -> None:
    packed = layer(896, 896)
    assert packed._matrix is not None
    other = numbers(896, 896, seed=3)
    assert FewRowsMatrix.of(packed._matrix, other) is None
    assert FewRowsMatrix.of(packed._matrix, numbers(864, 896, seed=2)) is None


def test_without_a_kernel_onednn_multiplies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "none.so")
    library.kernels.cache_clear()
    try:
        packed = layer(64, 64)
        assert packed._few_rows is None
        assert packed(numbers(1, 64)).shape == (1, 64)
    finally:
        library.kernels.cache_clear()


@pytest.mark.parametrize(
    ("mapped", "found"),
    [
        ("7f00-7f01 r-xp 0 fe:00 1  /opt/lib/libgomp-a34b3233.so.1.0.0\n", ["/opt/lib/libgomp-a34b3233.so.1.0.0"]),
        ("7f00 r-xp /conda/lib/libiomp5.so\n7f01 r--p /conda/lib/libiomp5.so\n", ["/conda/lib/libiomp5.so"]),
        ("7f00 r-xp /usr/lib/libcomp.so\n7f01 r-xp /usr/lib/libc.so.6\n", []),
    ],
)
def test_the_openmp_library_in_use_is_found(mapped: str, found: list[str]) -> None:
    assert library._openmp_of(mapped) == found


def test_torchs_own_openmp_library_goes_before_others() -> None:
    own = Path(torch.__file__).parent / "lib/libgomp.so.1"
    assert library._openmp_of(f"a /usr/lib/libgomp.so.1\nb {own}\n") == [str(own)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the kernels are compiled from, so that those in use stay."""
    return Path(
        shutil.copytree(Path(build.__file__).parent, tmp_path / "native", ignore=shutil.ignore_patterns("*.so"))
    )


def compile_in(tree: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(tree / "build.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_kernels_are_compiled_by_one_command(tree: Path) -> None:
    assert compile_in(tree).returncode == 0
    assert [path.name for path in tree.glob("*.so")] == ["kernels.so"]


def test_without_a_compiler_it_is_said_and_nothing_is_left(tree: Path) -> None:
    (tree / "kernels.so").write_bytes(b"of another version")
    done = compile_in(tree, CC="no-such-cc")
    assert (done.returncode, done.stderr) == (1, "there is no C compiler (cc).\n")
    assert not (tree / "kernels.so").exists()


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_compiler_that_refuses_is_quoted(tree: Path) -> None:
    (tree / "few_rows.c").write_text("#error not today\n")
    done = compile_in(tree)
    assert done.returncode == 1
    assert "not today" in done.stderr
    assert not list(tree.glob("*.so"))
