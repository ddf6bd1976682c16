"""Settings of the engine and of logging."""

from dataclasses import dataclass
from typing import Literal

from codecssl.pretrain.bounds import at_least
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Execution of the training steps. The DeepSpeed config is derived from it."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: bfloat16 weights and activations, with fp32 master weights in the optimizer; the loss is fp32."""
    accumulation: int = 1
    """Number of micro-batches per global batch on each rank."""
    zero_stage: int | None = None
    """DeepSpeed's ZeRO stage. 0: nothing is divided among ranks. 1: optimizer states. 2: also gradients. 3: also
    weights. null is 0 in fp32 and 1 in bf16."""
    activation_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass: less memory, a third more time."""
    compile: bool = False
    """Compile the layers with torch.compile."""

    def __post_init__(self) -> None:
        at_least("engine.accumulation", self.accumulation, 1)
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise UserError(f"engine.zero_stage: {self.zero_stage}, must be 0, 1, 2 or 3, or null for the usual one")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Intervals of logging, validation and checkpoints, in steps."""

    log_every: int = 100
    valid_every: int = 5_000
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    """Number of most recent checkpoints to keep."""
    stall_minutes: float = 30.0
    """Time without a finished step, validation batch or checkpoint after which the run ends with an error; 0 disables
    the check."""
    retry_seconds: float = 120.0
    """Time for which a read or a write is retried while a disk is unavailable. After that the run saves and exits
    with 70."""

    def __post_init__(self) -> None:
        for key in ("stall_minutes", "retry_seconds"):
            at_least(f"log.{key}", getattr(self, key), 0.0)
        for key in ("log_every", "valid_every", "checkpoint_every", "keep_checkpoints"):
            at_least(f"log.{key}", getattr(self, key), 1)
