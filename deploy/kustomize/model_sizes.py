"""Writes what models of two size classes ask of a cluster: `python -m deploy.kustomize.model_sizes`.

The figures come from the shapes of the released tensors (`deploy.sizing`), for the largest model of a class.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from deploy.sizing import Sizing, released

HERE = Path(__file__).parent
_GIB = 2**30
# A GPU of 80 GB, of which a service leaves some to the driver and to activations.
_GPU_BYTES, _GPU_SHARE = 80e9, 0.85
_SEQUENCES, _CONTEXT_TOKENS = 16, 8192
# A shard is read through the page cache; beside it a process has torch, its kernels and buffers.
_PROCESS_GIB, _SHARD_GIB = 6, 5
_SHARED_MEMORY_GIB = 1
_CLAIM_MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Models that one set of figures fits. `up_to` bounds the bytes of their language models' weights, in GiB."""

    name: str
    about: str
    above_gib: float
    up_to_gib: float

    def models(self) -> list[Sizing]:
        """Return the released models of the class."""
        return [model for model in released() if self.above_gib < model.language_bf16 / _GIB <= self.up_to_gib]


CLASSES = (
    SizeClass("small-models", "Models of 1B to 14B: one GPU of 80 GB for each stage.", 0, 30),
    SizeClass(
        "large-models", "Models of 26B to 78B: the language model's layers share several GPUs of 80 GB.", 30, 200
    ),
)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one class asks for."""

    vision_gpus: int
    llm_gpus: int
    vision_memory_gib: int
    llm_memory_gib: int
    claim_gib: int


def demand_of(models: list[Sizing]) -> Demand:
    """Return what the largest of some models asks for, at 16 bits."""
    usable = _GPU_BYTES * _GPU_SHARE
    kv_bytes = _SEQUENCES * _CONTEXT_TOKENS
    llm_bytes = max(model.language_bf16 + kv_bytes * model.kv_per_token for model in models)
    vision_bytes = max(model.vision_bf16 for model in models)
    whole = max(model.vision_bf16 + model.language_bf16 for model in models)
    shards = _PROCESS_GIB + _SHARD_GIB + _SHARED_MEMORY_GIB
    return Demand(
        vision_gpus=math.ceil(vision_bytes / usable),
        llm_gpus=math.ceil(llm_bytes / usable),
        vision_memory_gib=shards,
        llm_memory_gib=shards,
        claim_gib=math.ceil(whole / _GIB * _CLAIM_MARGIN),
    )


def component(size_class: SizeClass) -> str:
    """Return the text of a class's kustomization."""
    models = size_class.models()
    demand = demand_of(models)
    return _TEXT.format(
        about=size_class.about,
        models=", ".join(model.name for model in models),
        vision=_resources("vision", demand.vision_gpus, demand.vision_memory_gib, "4", ""),
        llm=_resources("llm", demand.llm_gpus, demand.llm_memory_gib, "6", _devices(demand.llm_gpus)),
        claim=demand.claim_gib,
    )


def _devices(count: int) -> str:
    if count == 1:
        return ""
    devices = ",".join(f"cuda:{index}" for index in range(count))
    return f"\n                env:\n                  - {{name: LLM_DEVICES, value: '{devices}'}}"


def _resources(name: str, gpus: int, memory_gib: int, cpu: str, environment: str) -> str:
    return _PATCH.format(name=name, gpus=gpus, memory=memory_gib, cpu=cpu, environment=environment)


_PATCH = """\
  - target: {{kind: Deployment, name: {name}}}
    patch: |
      apiVersion: apps/v1
      kind: Deployment
      metadata:
        name: {name}
      spec:
        template:
          spec:
            containers:
              - name: {name}
                resources:
                  requests: {{cpu: "{cpu}", memory: {memory}Gi}}
                  limits: {{memory: {memory}Gi, nvidia.com/gpu: {gpus}}}{environment}
"""
_TEXT = """\
# Made by `python -m deploy.kustomize.model_sizes` from the shapes of the released tensors. Comes after component gpu.
# {about}
# {models}
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
patches:
{vision}{llm}  - target: {{kind: PersistentVolumeClaim, name: models}}
    patch: |
      - op: replace
        path: /spec/resources/requests/storage
        value: {claim}Gi
"""


def main() -> int:
    """Write every class's component."""
    for size_class in CLASSES:
        folder = HERE / "components" / size_class.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kustomization.yaml").write_text(component(size_class), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
