"""Training settings of a bottleneck."""

from dataclasses import dataclass

from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BottleneckTrainConfig:
    """Training settings of a bottleneck."""

    head_steps: int = 1000
    """Steps of a head on the unmodified states, with labels. Stage B continues the model's own head."""
    a_steps: int = 1000
    """Steps of stage A, which needs no labels."""
    b_steps: int = 1000
    """Steps of stage B, with labels: a bottleneck and its head. Every other head gets as many on its own input."""
    batch_size: int = 16
    """Utterances per batch."""
    head_learning_rate: float = 1e-3
    """Decays to 0 over the stage, as do the next two."""
    a_learning_rate: float = 1e-3
    b_learning_rate: float = 1e-4
    answers_weight: float = 1.0
    """Weight in stage B of the distance to the answers of the head on the unmodified model."""
    weight_decay: float = 0.01
    vq_weight_a: float = 0.2
    quantizer_dropout: float = 0.5
    """Share of the utterances that keep a random number of codebooks. 0 with one codebook."""
    revive_steps: int = 100
    """Steps between searches for dead entries."""
    evaluations: int = 10
    """Evaluations on the validation part, during head training and during stage B; the best state is kept."""
    fit_frames: int = 40_000
    """Largest number of the model's frames used for initialization."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("head_steps", "a_steps", "b_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 0")
        for name in ("batch_size", "revive_steps", "evaluations", "fit_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("head_learning_rate", "a_learning_rate", "b_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.quantizer_dropout <= 1:
            raise UserError(f"quantizer_dropout {self.quantizer_dropout}: must be 0 to 1")
