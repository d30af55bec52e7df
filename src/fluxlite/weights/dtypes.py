"""Types of weights, as safetensors files spell them."""

import torch

DTYPES = {  # of weights, as safetensors spells them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}


def wider_dtype(a, b):
    """The smallest type that holds values of both."""
    if a == b:
        return a
    return torch.float32 if a.itemsize == b.itemsize else max(a, b, key=lambda of: of.itemsize)
