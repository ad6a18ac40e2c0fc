"""Makes a torchvision that was built for CUDA usable beside a torch for CPUs.

PyPI has no other. Its native library cannot be loaded there, so operators that its Python code describes do not exist,
and importing it fails. Declaring the two is enough to import it; resizing and normalizing are torch's own operators.
Pictures are decoded with Pillow instead.
"""

from pathlib import Path
from typing import Final

from benchmarks.peers.peer import PeerError

_MARK: Final = "# patched by benchmarks.peers.torchvision_patch"
_BEFORE: Final = '@torch.library.register_fake("torchvision::nms")'
_DECLARATIONS: Final = f"""\
{_MARK}
import torchvision.extension as _extension
if not _extension._has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


"""
_DECODING: Final = f"""

{_MARK}
def _decode_with_pillow(input, mode=None, apply_exif_orientation=False):
    import io

    import numpy
    from PIL import Image

    file = input if isinstance(input, str) else io.BytesIO(input.numpy().tobytes())
    return torch.from_numpy(numpy.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).contiguous()


try:
    _assert_has_image_ops()
except RuntimeError:
    decode_image = _decode_with_pillow
"""


def patch_torchvision(packages: Path) -> None:
    """Patch the torchvision in a folder of packages, once; raise `PeerError` for one of an unknown form."""
    operators = packages / "torchvision" / "_meta_registrations.py"
    pictures = packages / "torchvision" / "io" / "image.py"
    try:
        _insert(operators, _DECLARATIONS, before=_BEFORE)
        _insert(pictures, _DECODING)
    except FileNotFoundError as error:
        raise PeerError(f"torchvision has no {error.filename}: its form has changed.") from None


def _insert(file: Path, code: str, before: str = "") -> None:
    """Insert code before a line, or at the end."""
    text = file.read_text(encoding="utf-8")
    if _MARK in text:
        return
    if before not in text:
        raise PeerError(f"{file} does not hold {before}: its form has changed.")
    head, line, tail = text.partition(before) if before else (text, "", "")
    file.write_text(f"{head}{code}{line}{tail}", encoding="utf-8")
