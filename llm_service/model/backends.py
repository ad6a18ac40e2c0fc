"""Which attention runs on which device."""

import torch

from llm_service.model.attention import AttentionBackend
from llm_service.model.cpu_attention import CpuAttention, can_attend
from llm_service.model.flash_attention import flash_attention_for
from llm_service.model.plain_attention import PlainAttention


def attention_for(device: torch.device, dtype: torch.dtype, block_size: int) -> AttentionBackend:
    """Return the fastest attention that there is for a device's layers and blocks of so many tokens."""
    if device.type == "cpu" and can_attend(dtype):
        return CpuAttention
    return flash_attention_for(device, dtype, block_size) or PlainAttention
