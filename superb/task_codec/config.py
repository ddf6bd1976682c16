"""Training settings of a bottleneck."""

from dataclasses import dataclass

from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training settings of a bottleneck."""

    head_steps: int = 1000
    """With labels, of a head on the states as they are: the model's own one goes on in stage B."""
    a_steps: int = 1000
    """Without labels."""
    b_steps: int = 1000
    """With labels: of a bottleneck and its head; of every other head, which goes on as long on what it reads."""
    batch_size: int = 16
    """Utterances."""
    head_learning_rate: float = 1e-3
    """Falls to 0 over the stage, as the next two."""
    a_learning_rate: float = 1e-3
    b_learning_rate: float = 1e-4
    answers_weight: float = 1.0
    """In stage B, of the distance to the answers of the head on the model as it is."""
    weight_decay: float = 0.01
    vq_weight_a: float = 0.2
    quantizer_dropout: float = 0.5
    """Share of the utterances that keep a drawn number of codebooks; 0 where there is one codebook."""
    revive_steps: int = 100
    """Steps between two searches for dead entries."""
    evaluations: int = 10
    """Evaluations on the validation part, during head training and during stage B; the best state is kept."""
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
        for name in ("head_learning_rate", "a_learning_rate", "b_learning_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")
        if not 0 <= self.quantizer_dropout <= 1:
            raise UserError(f"quantizer_dropout {self.quantizer_dropout}: must be 0 to 1")
