"""The model card: a Markdown description of an exported model, written from the records of its run."""

from collections.abc import Iterable, Mapping
from typing import Any

from codecssl.configs.load import differences, from_dict
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.frame_rate import IN_FRAMES, at_frame_rate
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.mel import MelSpec

_TITLES = {
    ("codec2vec", "codes"): "Codec2Vec, predicting the codec's own codes (arXiv 2511.16639)",
    ("codec2vec", "labels"): "Codec2Vec, predicting given labels (arXiv 2511.16639, iterative clustering)",
    ("codec2vec", "online"): "Codec2Vec with online clusters (DinoSR, arXiv 2305.10005)",
    ("encodecmae", "codes"): "EnCodecMAE (arXiv 2309.07391)",
    ("encodecmae", "labels"): "EnCodecMAE, self-trained on labels (arXiv 2309.07391)",
}


def model_card(name: str, description: Mapping[str, Any], data: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a model's README.md.

    description: contents of config.json. data: one {"name", "utterances", "hours"} per training folder. It is empty if
    the folders no longer exist; the card then lists their fingerprints from config.json.
    """
    training = description["training"]
    config = from_dict(RunConfig, training["config"])
    card = CodecCard.from_dict(description["codec"])
    parts = (
        f"# {name}\n\n{_title(config)}: {config.model.layers} layers of {config.model.dim}, {training['step']:,} of"
        f" {config.optim.steps:,} steps, on tokens of the codec `{card.name}`. Made by codecssl"
        f" {training['versions'].get('codecssl', '')}.",
        _use(name, card, config.model.layers, config.model.dim, description.get("mel")),
        _trained_on(card, data, training["data"]),
        _figures(training["metrics"]),
        "## Curves\n\n![loss, accuracy and variety of the guesses](curves.png)",
        _config(config, card, training["versions"], training.get("changes", ())),
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(config: RunConfig) -> str:
    kind = config.objective.name, config.objective.target
    return _TITLES.get(kind, f"{kind[0]}, predicting {kind[1]}")


def _use(name: str, card: CodecCard, layers: int, dim: int, mel: Mapping[str, Any] | None) -> str:
    codes = f"int64 [B, {card.num_rows}, T], {float(card.frame_rate):g} frames/s"
    call, inputs = ("codes", codes) if mel is None else ("codes, mel=mel", f"{codes}; uint8 [B, {mel['bands']}, T]")
    return f"""## Use

```python
from codecssl.pretrain.export.pretrained import from_pretrained

model = from_pretrained("{name}")  # frozen, fp32, on the CPU
output = model(waves, sampling_rate=16_000)  # float waves [n]; the codec is loaded by its name
output = model({call}, output_hidden_states=True)  # {inputs}
output.hidden_states  # {layers + 1} tensors [B, T, {dim}]: the first layer's input, then each layer's output
```
```
codecssl-superb run --upstream {name} --tasks all --data ROOT --output results
```{_reads_mel(mel)}"""


def _reads_mel(mel: Mapping[str, Any] | None) -> str:
    if mel is None:
        return ""
    return (
        f"\n\nIt reads a log-mel plane: {mel['bands']} bands from {mel['low_hz']:g} to {mel['high_hz']:g} Hz, a window"
        f" of {mel['window']} samples at {mel['sample_rate']} Hz, as `codecssl-tokenize run"
        f" {MelSpec.from_dict(dict(mel)).options}` stores it. `codecssl.tokenize.mel.mel_plane(model.mel_spec, wave)`"
        " computes it, [T, bands], from a wave at the codec's rate."
    )


def _trained_on(card: CodecCard, data: Iterable[Mapping[str, Any]], fingerprints: Iterable[str]) -> str:
    rows = [f"| `{row['name']}` | {row['utterances']:,} | {row['hours']:.2f} |" for row in data]
    if rows:
        table = "\n".join(("| shards | utterances | hours |", "|---|--:|--:|", *rows))
    else:
        table = "\n".join(f"- shards with fingerprint `{fingerprint}`" for fingerprint in fingerprints)
    sizes = " ".join(map(str, card.codebook_sizes))
    return (
        f"## Data\n\n{table}\n\nCodec: `{card.name}`, {card.sample_rate} Hz, {float(card.frame_rate):g} frames/s,"
        f" {card.num_codebooks} codebooks ({sizes}), weights sha256 `{card.weights_sha256}`."
    )


def _figures(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the metrics of the last training step and the last validation up to the exported step."""
    if not metrics:
        return ""
    lines = [
        f"| {split} | {row['step']} | {row['loss']:.4f} | {100 * sum(row['accuracy']) / len(row['accuracy']):.2f}"
        f" | {row['predicted_perplexity'][0]:.1f} | {' '.join(f'{100 * value:.1f}' for value in row['accuracy'])} |"
        for split, row in metrics.items()
    ]
    head = "| split | step | loss, nats | accuracy % | perplexity of stream 0's guesses | accuracy per stream % |"
    return "\n".join(("## Figures at masked frames\n", head, "|---|--:|--:|--:|--:|---|", *lines))


def _config(
    config: RunConfig, card: CodecCard, versions: Mapping[str, str], changes: Iterable[Mapping[str, Any]]
) -> str:
    usual, own = (at_frame_rate(each, card.frame_rate) for each in (RunConfig(), config))
    changed = {key: new for key, (_, new) in differences(usual, own).items() if key not in ("data.dirs", *IN_FRAMES)}
    lines = "\n".join(f"- `{key}`: {value}" for key, value in sorted(changed.items()))
    lines += "".join(f"\n- from step {r['step']}: `{r['key']}` {r['new']}, before {r['old']}" for r in changes)
    built = ", ".join(f"{package} {number}" for package, number in versions.items())
    return f"## Config, where it differs from the defaults\n\n{lines}\n\nVersions: {built}."
