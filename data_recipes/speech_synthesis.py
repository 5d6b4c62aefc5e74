"""English words spoken by espeak-ng, through the library in the wheel `espeakng-loader`.

Used only where no recording can be had; whoever uses it says "synthesised" in every report.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import soxr

from posttrain.data.audio import SAMPLE_RATE_HZ

_SYNCHRONOUS = 2
_UTF8 = 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@cache
def _library() -> tuple[ctypes.CDLL, int]:
    """(espeak-ng, its sample rate in Hz)."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, 0)
    if rate_hz <= 0:
        raise RuntimeError("espeak-ng did not start; reinstall the wheel espeakng-loader")
    library.espeak_SetVoiceByName(b"en-us")
    return library, rate_hz


def speak(text: str) -> np.ndarray:
    """`text` as float32 (num_samples,) at 16 kHz."""
    library, rate_hz = _library()
    chunks: list[np.ndarray] = []

    def receive(samples: ctypes._Pointer, count: int, events: int) -> int:
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    waveform = np.concatenate(chunks).astype(np.float32) / 32_768
    return soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ).astype(np.float32)
