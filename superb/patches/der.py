"""The diarisation error rate (DER) as SUPERB takes it: no collar, overlapping speech counted, all files together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.errors import UserError

Turn = tuple[str, float, float]  # speaker, start and end in seconds


def error_rate(reference: Mapping[str, Sequence[Turn]], hypothesis: Mapping[str, Sequence[Turn]]) -> float:
    """Compute missed, false and confused speaker time over the reference's speaker time, as a fraction.

    Speakers are matched one to one per recording with minimal confusion. A recording is scored from the first turn to
    the last of either side, as NIST's md-eval does without a list of regions.
    """
    try:
        from pyannote.metrics.diarization import DiarizationErrorRate
    except ImportError as error:
        raise UserError(f"task sd: its scoring needs a package ({error}); pip install pyannote.metrics") from error
    import warnings

    metric = DiarizationErrorRate(collar=0.0, skip_overlap=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about using the recording's extent as its region, which is intended
        for name, turns in reference.items():
            metric(_annotation(turns), _annotation(hypothesis.get(name, ())))
    return float(abs(metric))


def _annotation(turns: Sequence[Turn]) -> Any:
    """Convert turns to an annotation. Overlapping turns of one speaker are merged."""
    from pyannote.core import Annotation, Segment

    annotation = Annotation()
    for number, (speaker, start, end) in enumerate(turns):
        if end > start:
            annotation[Segment(start, end), number] = speaker
    return annotation.support()


def read_rttm(path: Path) -> dict[str, list[Turn]]:
    """Read the turns of each recording from the SPEAKER lines of an RTTM file."""
    turns: dict[str, list[Turn]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields and fields[0] == "SPEAKER":
            start = float(fields[3])
            turns.setdefault(fields[1], []).append((fields[7], start, start + float(fields[4])))
    return turns


def score_files(dscore: Any, hypothesis: str, reference: str, result: str) -> float:
    """Replace s3prl's call of dscore. Returns the DER of two RTTM files in percent and writes it to `result`."""
    percent = 100 * error_rate(read_rttm(Path(reference)), read_rttm(Path(hypothesis)))
    Path(result).parent.mkdir(parents=True, exist_ok=True)
    Path(result).write_text(f"*** OVERALL *** {percent:.4f}\n", encoding="utf-8")
    return percent
