"""From a file that somebody chose to a picture for a model, or a sentence that says why not."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from workbench.errors import WorkbenchError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 100_000_000
MAX_SIDE = 1024  # no model here looks closer, and everything after the decoding stays fast

# Pillow refuses at twice this number by itself, before it decodes anything.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def read_picture(path: str | Path) -> Image.Image:
    """Read one picture file as RGB, upright, its longer side at most `MAX_SIDE` pixels.

    Transparency is laid on white, 16-bit and floating-point greys are brought to 8 bits, and of an
    animation only the first frame is taken: `picture.info["note"]` then says so in a sentence.

    Args:
        path: PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF.

    Raises:
        WorkbenchError: The file is missing, not a picture, damaged or larger than `MAX_PIXELS`.
    """
    name = Path(path).name
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return _decode(picture, name)
    except WorkbenchError:
        raise
    except FileNotFoundError:
        raise WorkbenchError(f"'{name}' is no longer there: choose the picture again.") from None
    except UnidentifiedImageError:
        raise WorkbenchError(
            f"'{name}' is not a picture: choose a PNG, JPEG, WebP, GIF, BMP or TIFF file."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # a decoder fails in its own way: OSError, SyntaxError, struct.error
        raise WorkbenchError(
            f"'{name}' is damaged and cannot be read to its end: save or download it again, "
            "or choose another picture."
        ) from error


def _decode(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large(name)
    n_frames = getattr(picture, "n_frames", 1)
    picture.draft(None, (MAX_SIDE, MAX_SIDE))  # lets JPEG decode at an eighth of the size or so
    picture.load()
    # Shrinking first keeps every later step, and its memory, small. A palette cannot be averaged.
    if picture.mode in ("P", "PA", "1"):
        picture = picture.convert("RGBA")
    picture = _eight_bits(picture)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), reducing_gap=2.0)
    picture = _on_white(ImageOps.exif_transpose(picture))
    picture.info = {}
    if n_frames > 1:
        picture.info["note"] = (
            f"'{name}' holds {n_frames} frames: the models see the first one only."
        )
    return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit and floating-point greys to 0..255, which Pillow would clip instead."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        grey = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        span = max(float(np.ptp(grey)), 1e-12)
        return Image.fromarray(((grey - grey.min()) / span * 255).astype(np.uint8))
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _too_large(name: str) -> WorkbenchError:
    return WorkbenchError(
        f"'{name}' has more than {MAX_PIXELS // 1_000_000} million pixels: "
        f"scale it down first, {MAX_SIDE} pixels on the longer side are plenty."
    )
