"""Export for transformers: `AutoModel.from_pretrained(DIR, trust_remote_code=True)` opens the folder without codecssl.

config.json, model.safetensors      renamed fp32 weights (float16 with `half`)
modeling_codecssl.py                a copy of hub/modeling_codecssl.py, which needs torch and transformers only
preprocessor_config.json            of the feature extractor, which pads codes and computes log-mel planes
README.md, curves.png               the model card with the Hub's metadata
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from codecssl.pretrain.export.export import CURVES, WEIGHTS, export, load_pretrained, read_description
from codecssl.pretrain.export.shipped import model_folder
from codecssl.pretrain.model.model import CodecModel
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import names_in, refuse_links_out, write_atomic

MODELING = Path(__file__).with_name("hub") / "modeling_codecssl.py"
FILES = {"config.json", WEIGHTS, MODELING.name, "preprocessor_config.json", "README.md", CURVES}
TAGS = ("audio", "self-supervised-learning", "neural-codec", "codecssl", "custom_code")
_LAYER = {
    "self_attn.": "",
    "self_attn_layer_norm": "attention_norm",
    "ffn_layer_norm": "ffn_norm",
    "own_ffn": "ffn",
}


def export_transformers(
    source: str | Path,
    output_dir: str | Path,
    *,
    half: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Export a run's newest checkpoint, an exported model or a shipped one in the format of transformers.

    license: the Hub's identifier of the weights' licence. datasets: names of the training data on the Hub, in addition
    to those that were tokenized as `hf:NAME`. What is not given or recorded is left out of the card. An earlier export
    in `output_dir` is replaced. Raises UserError if `output_dir` holds anything else.
    """
    from safetensors.torch import save_file

    output = Path(output_dir)
    if output.exists() and names_in(output) - FILES:
        raise UserError(f"{output}: is not empty and no earlier export; give another --output")
    refuse_links_out(output)
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(source)
        if (folder / "checkpoints").is_dir():
            export(folder, temporary)
            folder = Path(temporary)
        model, description = load_pretrained(folder), read_description(folder)
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").unlink(missing_ok=True)  # written last: a folder without it is not a valid model
        weights = renamed(model)
        save_file({name: value.half() if half else value for name, value in weights.items()}, output / WEIGHTS,
                  metadata={"format": "pt"})  # fmt: skip
        (output / CURVES).unlink(missing_ok=True)
        if (folder / CURVES).is_file():
            shutil.copyfile(folder / CURVES, output / CURVES)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {output.resolve().name}\n"
    shutil.copyfile(MODELING, output / MODELING.name)
    extractor = {
        "feature_extractor_type": "CodecSSLFeatureExtractor",
        "auto_map": {"AutoFeatureExtractor": f"{MODELING.stem}.CodecSSLFeatureExtractor"},
    }
    inputs = {
        key: value for key, value in config_of(model).items() if key in ("codebook_sizes", "input", "codec", "mel")
    }
    _write_json(output / "preprocessor_config.json", extractor | inputs)
    name = output.resolve().name
    header = metadata(name, model, description, license=license, datasets=datasets)
    (output / "README.md").write_text(f"---\n{header}\n---\n\n{_with_use(text, name, model)}", encoding="utf-8")
    auto = {
        "architectures": ["CodecSSLModel"],
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.CodecSSLConfig",
            "AutoModel": f"{MODELING.stem}.CodecSSLModel",
        },
        "model_type": "codecssl",
        "torch_dtype": "float32",
    }
    _write_json(output / "config.json", auto | config_of(model))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


def config_of(model: CodecModel) -> dict[str, Any]:
    """Return the fields of `CodecSSLConfig` for a model."""
    config = model.config
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn_dim,
        "hidden_act": config.activation,
        "norm": config.norm,
        "positions": config.positions,
        "input": config.input,
        "fusion": config.fusion,
        "tie_ffn": config.tie_ffn and config.norm == "residual",
        "conv_kernel": config.conv_kernel,
        "conv_groups": config.conv_groups,
        "max_frames": config.rotary_max_frames,
        "embedding_dim": config.embedding_dim or model.card.latent_dim,
        "codebook_sizes": list(model.card.row_sizes),
        "codec": model.card.to_dict(),
        "mel": None if model.mel_spec is None else model.mel_spec.to_dict(),
    }


def renamed(model: CodecModel) -> dict[str, Tensor]:
    """Return the weights under the names of `CodecSSLModel`, with the positions' weight norm folded."""
    found = {}
    for name, value in model.state_dict().items():
        name = name.replace("mel_projection.linear", "mel_projection").replace("positions.scale", "position_scale")
        if layer := re.fullmatch(r"encoder\.(layers\.\d+\.)(.*)", name):
            rest = layer[2]
            for ours, theirs in _LAYER.items():
                rest = rest.replace(ours, theirs)
            name = layer[1] + rest
        name = name.replace("encoder.layer_norm", "final_norm")
        if not name.startswith("positions.conv."):
            found[name] = value.detach().float().contiguous()
    if model.config.positions == "conv":
        conv: Any = model.positions.conv  # type: ignore[union-attr]
        direction = conv.weight_v.detach()
        norm = direction.square().sum(dim=(0, 1), keepdim=True).sqrt()
        found["position_conv.weight"] = (direction * (conv.weight_g.detach() / norm)).contiguous()
        found["position_conv.bias"] = conv.bias.detach().contiguous()
    return found


def metadata(
    name: str,
    model: CodecModel,
    description: Mapping[str, Any],
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """Return the YAML metadata of a model card for the Hub. Unknown fields are left out."""
    from huggingface_hub import EvalResult, ModelCardData

    training = description.get("training", {})
    config = training.get("config", {})
    objective = config.get("objective", {}).get("name")
    valid = training.get("metrics", {}).get("valid")
    results = None
    if valid:
        results = [EvalResult(
            task_type="feature-extraction",
            task_name="prediction of the codes of masked frames",
            dataset_type="codecssl-shards",
            dataset_name="held-out part of the pretraining shards",
            metric_type="accuracy",
            metric_value=round(100 * sum(valid["accuracy"]) / len(valid["accuracy"]), 2),
            metric_name="accuracy, %",
        )]  # fmt: skip
    known = [*datasets, *(hub_name for hub_name in training.get("hub_datasets", []) if hub_name not in datasets)]
    data = ModelCardData(
        model_name=name if results else None,
        license=license,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=[tag for tag in (*TAGS, model.card.name, objective) if tag],
        datasets=known or None,
        metrics=["accuracy"] if results else None,
        eval_results=results,
    )  # fmt: skip
    return data.to_yaml()


def _with_use(card: str, name: str, model: CodecModel) -> str:
    """Replace the section `Use` of a model card by one for transformers."""
    codes = f"int [{model.card.num_rows}, T] of each utterance, codes of `{model.card.name}`"
    call, note = {
        "codes": ("[codes, other]", f"{codes}, {float(model.card.frame_rate):g} frames/s"),
        "mel": (f"raw_speech=[wave], sampling_rate={model.card.sample_rate}", "float mono waves [n]"),
        "both": (f"[codes], raw_speech=[wave], sampling_rate={model.card.sample_rate}", f"{codes}, and its wave"),
    }[model.config.input]
    use = f"""## Use

```python
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
extractor = AutoFeatureExtractor.from_pretrained("{name}", trust_remote_code=True)
output = model(**extractor({call}), output_hidden_states=True)  # {note}
output.hidden_states  # {model.config.layers + 1} tensors [B, T, {model.config.dim}]
```

`modeling_codecssl.py` needs torch and transformers only. The codes come from `codecssl-tokenize run`, or from the codec
itself: its weights' sha256 is in config.json.
"""
    old = re.search(r"^## Use\n.*?(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    return card[: old.start()] + use + "\n" + card[old.end() :] if old else card.rstrip() + "\n\n" + use
