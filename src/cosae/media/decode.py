"""Bytes → pictures and waveforms, and those → what a model takes, by its own processor."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosae.errors import CosaeError
from cosae.io.untrusted import one_line
from cosae.media.files import Medium

Array = NDArray[np.float32]


def picture(medium: Medium) -> Any:
    """A picture in three colours, as Pillow has it. Raises CosaeError for what is none, naming it."""
    try:
        from PIL import Image
    except ImportError:
        raise CosaeError("Reading images needs Pillow: pip install 'cosae[vision]'.") from None
    try:
        if isinstance(medium.content, bytes):
            return Image.open(io.BytesIO(medium.content)).convert("RGB")
        return Image.fromarray(medium.content).convert("RGB")
    except Exception as error:  # Pillow's many readers fail in many ways
        raise CosaeError(f"{medium.name} must be an image. It cannot be read: {one_line(error)}.") from None


def waveform(medium: Medium, rate: int) -> Array:
    """(L,) samples of one channel, between −1 and 1, at `rate` a second. Raises CosaeError for what is no sound."""
    assert isinstance(medium.content, bytes)
    try:
        samples, own = _wav(medium.content) or _other(medium.content)
    except CosaeError:
        raise
    except Exception as error:
        raise CosaeError(f"{medium.name} must be a sound. It cannot be read: {one_line(error)}.") from None
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    common = np.gcd(own, rate)
    return np.asarray(resample_poly(samples, rate // common, own // common), dtype=np.float32)


def _wav(content: bytes) -> tuple[Array, int] | None:
    """A plain .wav file, which the standard library reads; None for any other."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return None
    raw = np.frombuffer(data[: len(data) - len(data) % (width * channels)], np.uint8).reshape(-1, width)
    if width == 1:
        values = (raw[:, 0].astype(np.float32) - 128) / 128
    else:
        padded = np.concatenate(
            [np.zeros((len(raw), 4 - width), np.uint8), raw], axis=1
        )  # to 32 bits, little end first
        values = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    return values.reshape(-1, channels).mean(1, dtype=np.float32), rate


def _other(content: bytes) -> tuple[Array, int]:
    try:
        import soundfile
    except ImportError:
        raise CosaeError("Reading sound other than plain .wav needs soundfile: pip install 'cosae[audio]'.") from None
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return samples.mean(1), int(rate)


def load_processor(name: str, kind: str, revision: str | None = None) -> Any:
    """The model's own processor of images or sound. Raises CosaeError where it has none."""
    import transformers

    where: dict[str, Any] = {"revision": revision} if revision is not None else {}
    recent = int(transformers.__version__.split(".")[0]) >= 5
    if kind == "images":  # without torchvision
        where |= {"backend": "pil"} if recent else {"use_fast": False}
    auto: Any = transformers.AutoImageProcessor if kind == "images" else transformers.AutoFeatureExtractor
    try:
        return auto.from_pretrained(name, **where)
    except ImportError as error:
        raise CosaeError(f"Reading {kind} needs a package: {one_line(error)}; pip install 'cosae[vision]'.") from None
    except Exception as error:
        raise CosaeError(f"no processor of {kind} could be read from '{name}': {one_line(error)}.") from None


def pixels_of(media: Sequence[Medium], processor: Any) -> dict[str, Tensor]:
    """What a vision model takes. Arrays (C, H, W) of floats are its input as they are."""
    ready = [torch.from_numpy(np.array(m.content, np.float32)) for m in media if _is_ready(m.content)]
    if ready:
        return {"pixel_values": torch.stack(ready)}
    if processor is None:
        raise CosaeError("this model reads arrays (N, C, H, W) of floats alone: it has no processor of images.")
    found = processor(images=[picture(medium) for medium in media], return_tensors="pt")
    return {"pixel_values": found["pixel_values"]}


def sound_of(windows: Sequence[Array], processor: Any) -> dict[str, Tensor]:
    """What an audio model takes, of windows of one length."""
    found = processor([*windows], sampling_rate=processor.sampling_rate, return_tensors="pt")
    return {name: found[name] for name in ("input_features", "input_values") if name in found}


def _is_ready(content: Any) -> bool:
    return not isinstance(content, bytes) and content.dtype.kind == "f"
