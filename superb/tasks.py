"""SUPERB's ten tasks, and three of sound and music: the s3prl problem, labels, metrics and training time of each.

Heads, batch sizes, optimisers and metrics are s3prl's own. A budget scales the number of steps and the spacing of
evaluations, and the default learning rates, because SUPERB's small rates need long training. Tables name the budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a task. Rows of results hold it as s3prl's fraction; tables show it times 100."""

    key: str
    """Name of the metric in s3prl."""
    label: str
    higher_better: bool


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. `columns(row)` gives the columns of s3prl's CSV next to id and wav_path."""

    name: str
    title: str
    problem: str | None
    """Class in s3prl.problem; None if SUPERB trains nothing (qbe)."""
    corpus: str
    """Corpus of the official benchmark."""
    metrics: tuple[Metric, ...]
    """Metrics of the task. The first one, on the validation set, selects the learning rate."""
    columns: Callable[[ManifestRow], dict[str, Any]]
    splits: tuple[str, ...] = SPLITS
    classes: bool = False
    """True for a closed set of labels: a label that never occurs in training cannot be predicted."""
    work: int = 1
    """Approximate cost of a step; a pooled linear head has 1. Budgets with `lighten` divide their steps by it."""
    lrs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Default learning rates under a budget, by the budget's name, where they differ from `Budget.learning_rates`."""
    shortest: float = 0.02
    """Minimum duration of a clip, seconds. Shorter clips are left out and counted."""
    superb: bool = True
    """False for tasks that are not SUPERB's. `all` does not select them. They take the head of SUPERB's sid."""

    @property
    def metric(self) -> str:
        return self.metrics[0].key

    @property
    def higher_better(self) -> bool:
        return self.metrics[0].higher_better


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Number of steps: official / divisor, at least `least`."""

    name: str
    divisor: int
    least: int
    evaluations: int  # on the validation set, evenly spaced; the best checkpoint is tested
    learning_rates: tuple[float, ...] = ()  # default sweep; () selects the official learning rate of the task
    lighten: bool = False  # divide steps and evaluations by the task's work, test heavy heads on a few utterances
    pairs: int | None = None  # pairs of query and document that QbE compares per layer; None: all

    def steps(self, official: int, work: int = 1) -> int:
        steps = max(official // self.divisor, min(self.least, official))
        return max(1, steps // work) if self.lighten else steps

    def tested(self, work: int = 1) -> int | None:
        """Maximum number of validation and test utterances of a head with this work; None: all."""
        return 8 if self.lighten and work >= 100 else None

    def checks(self, work: int = 1) -> int:
        """Return the number of evaluations on the validation set."""
        return max(1, self.evaluations // work) if self.lighten else self.evaluations


def _first(column: str, *names: str) -> Callable[[ManifestRow], dict[str, Any]]:
    """Make a function that returns the first of the columns `names` that a row has, as s3prl's `column`."""

    def columns(row: ManifestRow) -> dict[str, Any]:
        for name in names:
            if row.get(name) is not None:
                return {column: str(row[name])}
        raise KeyError(" or ".join(names))

    return columns


def _keyword(row: ManifestRow) -> dict[str, Any]:
    """Return the label of a keyword, and its place in seconds if the row has `start` and `end`."""
    place = {"start_sec": row["start"], "end_sec": row["end"]} if row.get("end") is not None else {}
    return {**_first("label", "keyword", "label")(row), **place}


def _intent(row: ManifestRow) -> dict[str, Any]:
    slots = row["slots"]
    return {"labels": " ; ".join(str(slots[slot]) for slot in ("action", "object", "location"))}


def _phones(row: ManifestRow) -> dict[str, Any]:
    phones = row["phones"]
    return {"transcription": phones if isinstance(phones, str) else " ".join(phones)}


def _slots(row: ManifestRow) -> dict[str, Any]:
    """Words and one tag a word. s3prl marks a slot's ends itself, so B- and I- are dropped; its metrics separate
    slots by colon and semicolon, so words lose them.
    """
    words, tags = str(row["text"]).split(), str(row["iob"]).split()
    if len(words) != len(tags):
        raise ValueError(f"iob has {len(tags)} tags for {len(words)} words")
    words = [word.replace(":", "").replace(";", "") or "-" for word in words]
    names = [tag[2:] if tag[:2] in ("B-", "I-") else tag for tag in tags]
    return {"transcription": " ".join(words), "iob": " ".join(names)}


def _segments(row: ManifestRow) -> dict[str, Any]:
    segments = [(str(s["speaker"]), float(s["start"]), float(s["end"])) for s in row["segments"]]
    if len({speaker for speaker, _, _ in segments}) > 2:
        raise ValueError("segments name more than two speakers")
    return {"segments": segments}


def _search(row: ManifestRow) -> dict[str, Any]:
    if row["role"] == "query":
        return {"role": "query", "query": str(row["query"])}
    return {"role": "document", "queries": [str(query) for query in row["queries"]]}


ACCURACY = Metric(key="accuracy", label="acc %", higher_better=True)
HEAVY = {"smoke": (1e-3,), "demo": (1e-3,), "quick": (1e-3, 1e-4)}

TASKS = {
    task.name: task
    for task in (
        Task(
            name="pr",
            title="Phoneme recognition",
            problem="SuperbPR",
            corpus="LibriSpeech train-clean-100",
            metrics=(Metric(key="per", label="PER %", higher_better=False),),
            columns=_phones,
            lrs={"smoke": (1e-2,), "quick": (1e-2, 1e-3)},
        ),
        Task(
            name="asr",
            title="Speech recognition",
            problem="SuperbASR",
            corpus="LibriSpeech train-clean-100",
            metrics=(
                Metric(key="wer", label="WER %", higher_better=False),
                Metric(key="wer_lm", label="WER with LM %", higher_better=False),
            ),
            columns=_first("transcription", "text"),
            work=100,
            lrs=HEAVY,
        ),
        Task(
            name="ks",
            title="Keyword spotting",
            problem="SuperbKS",
            corpus="Speech Commands v0.01",
            metrics=(ACCURACY,),
            columns=_keyword,
            classes=True,
        ),
        Task(
            name="qbe",
            title="Query by example",
            problem=None,
            corpus="QUESST14, English",
            metrics=(Metric(key="mtwv", label="MTWV x100", higher_better=True),),
            columns=_search,
            splits=("valid", "test"),
        ),
        Task(
            name="sid",
            title="Speaker identification",
            problem="SuperbSID",
            corpus="VoxCeleb1",
            metrics=(ACCURACY,),
            columns=_first("label", "speaker"),
            classes=True,
        ),
        Task(
            name="asv",
            title="Speaker verification",
            problem="SuperbASV",
            corpus="VoxCeleb1",
            metrics=(Metric(key="eer", label="EER %", higher_better=False),),
            columns=_first("spk", "speaker"),
            splits=("train", "test"),
            work=20,
            lrs=HEAVY,
            shortest=0.5,  # the x-vector's time-delay layers take 14 frames away
        ),
        Task(
            name="sd",
            title="Speaker diarization",
            problem="SuperbSD",
            corpus="Libri2Mix",
            metrics=(Metric(key="der", label="DER %", higher_better=False),),
            columns=_segments,
            work=20,
            lrs=HEAVY,
        ),
        Task(
            name="ic",
            title="Intent classification",
            problem="SuperbIC",
            corpus="Fluent Speech Commands",
            metrics=(ACCURACY,),
            columns=_intent,
            classes=True,
        ),
        Task(
            name="sf",
            title="Slot filling",
            problem="SuperbSF",
            corpus="Audio SNIPS",
            metrics=(
                Metric(key="slot_type_f1", label="F1 %", higher_better=True),
                Metric(key="slot_value_cer", label="CER %", higher_better=False),
            ),
            columns=_slots,
            work=100,
            lrs=HEAVY,
        ),
        Task(
            name="er",
            title="Emotion recognition",
            problem="SuperbER",
            corpus="IEMOCAP",
            metrics=(ACCURACY,),
            columns=_first("label", "style", "label"),
            classes=True,
        ),
        *(
            Task(
                name=name,
                title=title,
                problem="SuperbSID",
                corpus=f"none of SUPERB's (HEAR: {corpora})",
                metrics=(ACCURACY,),
                columns=_first("label", column, "label"),
                classes=True,
                superb=False,
            )
            for name, title, corpora, column in (
                ("env", "Environmental sound", "ESC-50", "sound"),
                ("inst", "Musical instrument", "Beijing Opera, NSynth", "instrument"),
                ("pitch", "Pitch of a note", "NSynth", "pitch"),
            )
        ),
    )
}

BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(name="full", divisor=1, least=1, evaluations=40),
        Budget(name="quick", divisor=100, least=300, learning_rates=(1e-3, 1e-4), evaluations=10, pairs=20_000),
        Budget(
            name="demo",
            divisor=2000,
            least=500,
            learning_rates=(1e-2,),
            evaluations=5,
            lighten=True,
            pairs=2000,
        ),
        Budget(
            name="smoke",
            divisor=2000,
            least=100,
            learning_rates=(1e-2, 1e-3),
            evaluations=4,
            lighten=True,
            pairs=2000,
        ),
    )
}


GROUPS = {"all": True, "sound": False}
"""Names of groups of tasks: whether they are SUPERB's."""


def choose(names: str) -> list[Task]:
    """Return the tasks of a comma-separated list. `all` selects SUPERB's ten, `sound` the three others."""
    groups = {group: [task.name for task in TASKS.values() if task.superb == ten] for group, ten in GROUPS.items()}
    given = [name.strip() for name in names.split(",") if name.strip()]
    wanted = [task for name in given for task in groups.get(name, [name])]
    for name in wanted:
        if name not in TASKS:
            raise UserError(f"task {name}: not known; give some of {','.join(TASKS)}, all (SUPERB's ten) or sound")
    if not wanted:
        raise UserError(f"tasks '{names}': names no task; give some of {','.join(TASKS)}, all or sound")
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def lrs_of(task: Task, budget: Budget) -> tuple[float | None, ...]:
    """Return the default learning rates of a sweep. None stands for the official one, or for no training (qbe)."""
    if task.problem is None:
        return (None,)
    return task.lrs.get(budget.name, budget.learning_rates) or (None,)


def official_config(task: Task) -> dict[str, Any]:
    """Return s3prl's configuration of the task; {} if nothing is trained."""
    import s3prl.problem

    if task.problem is None:
        return {}
    config: dict[str, Any] = getattr(s3prl.problem, task.problem)().default_config()
    return config
