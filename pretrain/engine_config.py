"""Settings of the engine and of what a run reports."""

from dataclasses import dataclass
from typing import Literal

from codecssl.pretrain.bounds import at_least
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the steps are executed; the DeepSpeed dictionary is derived from it."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: bfloat16 weights and activations, with fp32 master weights in the optimizer; the loss is fp32."""
    accumulation: int = 1
    """Micro-batches that make up one global batch on one rank."""
    zero_stage: int | None = None
    """DeepSpeed's ZeRO: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights are divided among ranks; null is
    0 in fp32 and 1 in bf16."""
    activation_checkpointing: bool = False
    """Compute the layers' activations twice instead of keeping them: less memory, a third more time."""
    compile: bool = False
    """torch.compile the layers."""

    def __post_init__(self) -> None:
        at_least("engine.accumulation", self.accumulation, 1)
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise UserError(f"engine.zero_stage: {self.zero_stage}, must be 0, 1, 2 or 3, or null for the usual one")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often the run speaks and saves, in steps."""

    log_every: int = 100
    valid_every: int = 5_000
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    stall_minutes: float = 30.0
    """The run ends with an error when no step, validation batch or checkpoint was finished for so long; 0 is never."""
    retry_seconds: float = 120.0
    """How long a read or a write is tried again while a disk is away; after that the run saves and exits with 70."""

    def __post_init__(self) -> None:
        for key in ("stall_minutes", "retry_seconds"):
            at_least(f"log.{key}", getattr(self, key), 0.0)
        for key in ("log_every", "valid_every", "checkpoint_every", "keep_checkpoints"):
            at_least(f"log.{key}", getattr(self, key), 1)
