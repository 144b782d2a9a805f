"""The embedded matched pair: one causal and one masked-diffusion twin, found by paradigm; imports no torch."""

from pathlib import Path

PAIR = {paradigm: Path(__file__).parent / paradigm for paradigm in ("autoregressive", "diffusion")}


def folder(paradigm: str) -> Path:
    """Return the folder of one twin, fit for `from_pretrained`.

    Args:
        paradigm: `autoregressive` or `diffusion`.

    Raises:
        KeyError: There is no twin of that paradigm.
    """
    return PAIR[paradigm]
