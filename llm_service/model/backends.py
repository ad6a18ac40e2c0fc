"""Which attention runs on which device."""

import torch

from llm_service.model.attention import AttentionBackend
from llm_service.model.cpu_attention import CpuAttention, can_attend
from llm_service.model.plain_attention import PlainAttention


def attention_for(device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """Return the fastest attention that there is for a device's layers."""
    if device.type == "cpu" and can_attend(dtype):
        return CpuAttention
    return PlainAttention
