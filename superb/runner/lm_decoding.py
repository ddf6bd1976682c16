"""Speech recognition with a language model: s3prl's own beam decoder (flashlight) on the tested checkpoint.

The decoder's settings are s3prl's defaults, SUPERB's: beam 5, threshold 25, language model weight 2, word score -1. The
lexicon is the language model's words that the task's characters can spell.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codecssl.superb import results
from codecssl.superb.patches import restricted_pickle
from codecssl.superb.reporting.predictions import ANSWERS_LM
from codecssl.tokenize.common.errors import UserError

BLANK, SPACE = "#", "|"  # in s3prl's decoder


def check_decoder() -> None:
    """Raise UserError if the decoder's packages are missing."""
    try:
        import flashlight.lib.text.decoder  # noqa: F401
        import kenlm  # noqa: F401
    except ImportError as error:
        remedy = "pip install flashlight-text kenlm (a C++ compiler and cmake build the second)"
        raise UserError(f"--lm: decoding needs packages that are not installed ({error}); {remedy}") from error


def word_errors(problem: Any, folder: Path, language_model: Path, device: str, most: int | None = None) -> float:
    """Compute the word error rate of the run in `folder` on its test set, with the language model.

    `most` limits the number of utterances. Hypotheses are written to evaluate/valid_best/test: hyp_lm with a line per
    utterance, and answers_lm.json.
    """
    from s3prl.metric import wer

    check_decoder()
    tokenizer_path = next(folder.glob("*.tokenizer.pkl"))
    with tokenizer_path.open("rb") as file:
        tokenizer = restricted_pickle.load(file)
    decoder = make_decoder([tokenizer.idx_to_vocab(i) for i in range(tokenizer.vocab_size)], language_model, folder)
    _, task = problem.load_model_and_task(folder / "train" / "valid_best")
    dataset = problem.build_dataset({}, folder, folder / "cache", "test", folder / "test.csv", tokenizer_path)
    items = [dataset[i] for i in range(min(len(dataset), most or len(dataset)))]
    heard = [decode(decoder, task.model.to(device).eval(), item["x"].to(device)) for item in items]
    lines = [f"{item['unique_name']} {text}\n" for item, text in zip(items, heard, strict=True)]
    tested = folder / "evaluate" / "valid_best" / "test"
    (tested / "hyp_lm").write_text("".join(lines), encoding="utf-8")
    results.write_json(
        tested / ANSWERS_LM, {item["unique_name"]: text for item, text in zip(items, heard, strict=True)}
    )
    return float(wer(heard, [item["labels"] for item in items]))


def decode(decoder: Any, model: Any, wav: Any) -> str:
    """Decode a 16 kHz wave, float [samples] or [samples, 1], to words."""
    import torch

    with torch.no_grad():
        logits, _ = model(wav.view(1, -1, 1), torch.LongTensor([wav.numel()]))
        best = decoder.decode(logits.log_softmax(dim=2))[0]
    return " ".join(best[0]["words"]) if best else ""


def make_decoder(vocabulary: list[str], language_model: Path, folder: Path) -> Any:
    """Build s3prl's decoder for a character vocabulary (0 is the blank). Its files are written to `folder`."""
    from s3prl.nn.beam_decoder import BeamDecoder

    names = [BLANK if i == 0 else SPACE if token == " " else token for i, token in enumerate(vocabulary)]
    if len(set(names)) < len(names) or SPACE not in names:
        raise UserError(f"--lm: the transcripts need spaces and must not contain {BLANK} or {SPACE}; change them")
    words = [word for word in unigrams(language_model) if set(word) <= set(names)]
    if not words:
        raise UserError(
            f"--lm {language_model}: none of its words is spelled in the letters of the transcripts; check the case"
        )
    tokens, lexicon = folder / "lm_tokens.txt", folder / "lm_lexicon.txt"
    tokens.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    lexicon.write_text("".join(f"{word}\t{' '.join(word)} {SPACE}\n" for word in words), encoding="utf-8")
    try:
        return BeamDecoder(token=str(tokens), lexicon=str(lexicon), lm=str(language_model))
    except RuntimeError as error:
        raise UserError(f"--lm {language_model}: kenlm can't read it ({str(error).splitlines()[0]})") from error


def unigrams(path: Path) -> Iterator[str]:
    """Yield the words of an ARPA language model without its markers."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("\\1-grams:"):
                    break
            for line in lines:
                fields = line.split()
                if not fields or line.startswith("\\"):
                    return
                if not fields[1].startswith("<"):
                    yield fields[1]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"--lm {path}: no ARPA language model ({error}); give one, plain or .gz") from error
