"""Matrices of fewer bits are rounded as they should be, and multiplied by as if they were written out."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from shared.errors import CheckpointError
from shared.quantize import Quantization, Scheme, quantize_linears, scheme_of

ROOT = Path(__file__).parents[2]
# The sixteen values of NF4: quantiles of a normal distribution, scaled to 1, as its paper lists them.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
BOTH: list[Quantization] = ["int8", "nf4"]


def scheme(quantization: Quantization) -> Scheme:
    found = scheme_of(quantization)
    assert found
    return found


def rounded(quantization: Quantization, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values and the scales of a matrix."""
    memory = scheme(quantization).empty(*matrix.shape, matrix.device)
    scheme(quantization).round(matrix, *memory)
    return memory


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written_out(quantization: Quantization, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the matrix that is kept, columns that fill up a block included."""
    if quantization == "int8":
        return values.float() * scales
    levels = torch.stack((values >> 4, values & 15), dim=-1).flatten(1)  # two numbers in a byte, the first one above
    return NF4[levels.int()] * scales.repeat_interleave(64, dim=1)


def nearest(matrix: torch.Tensor) -> torch.Tensor:
    """Return the values of NF4 that are nearest to numbers from -1 to 1."""
    return NF4[(matrix[..., None] - NF4).abs().argmin(dim=-1)]


def test_int8_rounds_each_row_to_127_levels_of_its_largest_number() -> None:
    matrix = random(5, 48)
    matrix[3] *= 1000
    values, scales = rounded("int8", matrix)
    assert values.dtype == torch.int8
    largest = matrix.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scales, largest / 127, rtol=1e-3, atol=0)
    assert ((values.float() * scales - matrix).abs() <= 0.51 * scales).all()


def test_nf4_rounds_to_the_nearest_of_sixteen_values_of_each_block_of_a_row() -> None:
    matrix = random(6, 128)
    matrix[2, 64:] *= 100
    values, scales = rounded("nf4", matrix)
    blocks = matrix.view(6, 2, 64)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(scales, largest.squeeze(-1))
    torch.testing.assert_close(written_out("nf4", values, scales), (nearest(blocks / largest) * largest).view(6, 128))


@pytest.mark.parametrize("columns", [48, 72, 4, 130])
def test_a_row_that_fills_no_whole_block_is_filled_up_with_zeros(columns: int) -> None:
    matrix = random(7, columns)
    kept = written_out("nf4", *rounded("nf4", matrix))
    assert kept.shape == (7, -(-columns // 64) * 64)
    assert not kept[:, columns:].any()
    assert functional.cosine_similarity(kept[:, :columns], matrix).min() > 0.98


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize("shape", [(96, 64), (72, 48), (128, 72), (3, 896)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_product_is_that_with_the_matrix_that_is_kept(
    quantization: Quantization, shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    bias = random(shape[0], seed=1).to(dtype)
    values, scales = rounded(quantization, (random(*shape) * 0.05).to(dtype))
    kept = written_out(quantization, values, scales)[:, : shape[1]]
    for batch in ((1,), (17,), (2, 5)):  # one token, many, tiles of patches
        inputs = random(*batch, shape[1], seed=2).to(dtype)
        inputs[..., 0] = 300  # an input far above the others
        outputs = scheme(quantization).multiply(inputs, values, scales, bias)
        assert outputs.dtype == dtype
        expected = functional.linear(inputs.float(), kept, bias.float())
        torch.testing.assert_close(outputs.float(), expected, rtol=tolerance, atol=tolerance * float(expected.std()))
        without = scheme(quantization).multiply(inputs, values, scales, None)
        assert not torch.equal(without, outputs)


@pytest.mark.parametrize("quantization", BOTH)
def test_what_one_row_of_a_batch_has_changes_no_other(quantization: Quantization) -> None:
    values, scales = rounded(quantization, random(64, 64))
    inputs = random(8, 64, seed=1)
    alone = scheme(quantization).multiply(inputs, values, scales, None)
    inputs[3] = 1e5
    inputs[5, 7] = torch.nan
    beside = scheme(quantization).multiply(inputs, values, scales, None)
    for row in (0, 1, 2, 4, 6, 7):
        torch.testing.assert_close(beside[row], alone[row])
    assert beside[5].isnan().all()


@pytest.mark.parametrize("quantization", BOTH)
@pytest.mark.parametrize("shape", [(96, 64), (72, 48), (5, 130)], ids=str)
def test_the_size_that_is_planned_with_is_the_size_that_is_taken(
    quantization: Quantization, shape: tuple[int, int]
) -> None:
    values, scales = rounded(quantization, random(*shape))
    assert scheme(quantization).size_bytes(*shape) == values.nbytes + scales.nbytes


@pytest.mark.parametrize("quantization", BOTH)
def test_a_matrix_that_is_rounded_in_pieces_is_rounded_as_its_rows_are(quantization: Quantization) -> None:
    matrix = random(1500, 1024)  # more than a piece
    values, scales = rounded(quantization, matrix)
    for rows in (slice(0, 1), slice(1020, 1030), slice(1499, 1500)):
        own_values, own_scales = rounded(quantization, matrix[rows])
        assert torch.equal(values[rows], own_values)
        assert torch.equal(scales[rows], own_scales)


def test_the_linear_layers_below_a_name_wait_for_their_matrices_and_no_others_do() -> None:
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64, bias=False))]),
            "head": nn.Linear(64, 8),
        }
    )
    model.requires_grad_(requires_grad=False)
    matrices = {name: weight.clone() for name, weight in model.named_parameters() if name.endswith("weight")}
    inputs = random(3, 64)
    expected = model["blocks"][0](inputs)  # type: ignore[index]
    holders = quantize_linears(model, "blocks", scheme("int8"), lambda name: torch.device("cpu"))
    assert holders.keys() == {"blocks.0.0.weight", "blocks.0.2.weight"}
    assert {name for name, _ in model.named_parameters()} == {"blocks.0.0.bias", "head.weight", "head.bias"}
    for name, hold in holders.items():
        hold(matrices[name])
    outputs = model["blocks"][0](inputs)  # type: ignore[index]
    assert not torch.equal(outputs, expected)
    assert functional.cosine_similarity(outputs, expected).min() > 0.999
    assert {buffer.dtype for buffer in model.buffers()} == {torch.int8, torch.float32}


def test_nothing_is_quantized_unless_it_is_asked_for() -> None:
    assert scheme_of("none") is None


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CheckpointError, match=r"--quantization int8: install internvl-serving\[quantization\]"):
        scheme_of("int8")


def run(program: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = ":".join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )


def test_the_module_alone_needs_no_torch() -> None:
    run("import sys, shared.quantize; assert not {'torch', 'bitsandbytes'} & sys.modules.keys()")


def test_no_program_is_fetched_where_the_library_would_fetch_one(tmp_path: Path) -> None:
    """On some CPUs the library asks the package `kernels` for a program from the network."""
    (tmp_path / "kernels.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('mark').touch()\n"
        "def get_kernel(*names, **options): raise RuntimeError('asked')\n"
    )
    program = (
        "import torch; from shared.quantize import scheme_of; nf4 = scheme_of('nf4'); cpu = torch.device('cpu');"
        "nf4.round(torch.ones(2, 64), *nf4.empty(2, 64, cpu)); import bitsandbytes"
    )
    done = run(program, tmp_path)
    assert not (tmp_path / "mark").exists()
    assert "kernels" not in done.stderr
    run(f"{program}; import kernels; kernels.get_kernel", tmp_path)  # it can be imported by others afterwards
    assert (tmp_path / "mark").exists()
