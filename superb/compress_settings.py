"""How a bottleneck is trained."""

from dataclasses import dataclass

from codecssl.tokenize.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a bottleneck is trained."""

    head_steps: int = 1000
    """Of the head on the model as it is: what stage B starts from, and what it is compared to."""
    a_steps: int = 2000
    b_steps: int = 2000
    batch_size: int = 16
    """Utterances."""
    learning_rate: float = 1e-3
    """Falls to 0 over each stage."""
    vq_weight_a: float = 0.2
    quantizer_dropout: float = 0.5
    """Share of the utterances that keep a drawn number of codebooks; 0 where there is one codebook."""
    revive_steps: int = 100
    """Between two looks for dead entries."""
    evaluations: int = 10
    """Of the validation part, in the head's training and in stage B; the best one is kept."""
    fit_frames: int = 40_000
    """Frames of the model that the start is made from, at most."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("head_steps", "a_steps", "b_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 0")
        for name in ("batch_size", "revive_steps", "evaluations", "fit_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.quantizer_dropout <= 1 or self.learning_rate <= 0:
            raise UserError(
                f"quantizer_dropout {self.quantizer_dropout}, learning_rate {self.learning_rate}: must be "
                "0 to 1, and above 0"
            )
