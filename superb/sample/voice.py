"""Voices of the sample corpus: speakers, styles, espeak-ng, rooms and noise.

Only `make_sample` needs this file. espeak-ng is a formant synthesiser: a variant sets the formants, and here
a speaker is an accent, a variant, a pitch, a rate and the length of a vocal tract (all formants scaled by
resampling). Each utterance strays from the speaker's means and gets a room, a microphone, a level and a noise
of its own, so that averaged spectra do not tell all.
"""

from __future__ import annotations

import io
import subprocess
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from codecssl.tokenize.common.errors import UserError

SAMPLE_RATE = 16_000
Wave = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """One voice. `pitch` is espeak-ng's 0 to 99, `rate` words a minute, `tract` scales all formants."""

    name: str
    gender: str
    accent: str
    variant: str
    pitch: int
    rate: int
    tract: float


def _speakers() -> tuple[Speaker, ...]:
    table = (
        ("f", "en-us", "f1", 45, 165, 1.00), ("m", "en-gb", "m1", 50, 160, 1.00),
        ("f", "en-gb", "f2", 55, 175, 0.97), ("m", "en-us", "m3", 40, 170, 0.96),
        ("f", "en-gb-scotland", "f4", 50, 155, 1.03), ("m", "en-us", "m7", 60, 180, 1.02),
        ("f", "en-us", "linda", 35, 170, 1.00), ("m", "en-gb-scotland", "m8", 65, 165, 1.04),
        ("f", "en-gb-x-rp", "Annie", 40, 160, 0.96), ("m", "en-gb-x-rp", "robert", 45, 150, 0.98),
        ("f", "en-us", "f5", 30, 180, 0.95), ("m", "en-us", "Michael", 55, 160, 1.05),
        ("f", "en-gb", "f3", 45, 165, 1.02), ("m", "en-us", "m4", 60, 175, 0.99),
        ("f", "en-us", "aunty", 60, 170, 0.98), ("m", "en-gb", "Alex", 50, 165, 1.03),
        ("f", "en-us", "f2", 40, 160, 1.05), ("m", "en-gb", "m3", 65, 170, 1.01),
        ("f", "en-gb-scotland", "f3", 60, 175, 0.95), ("m", "en-us", "m5", 35, 160, 0.97),
    )  # fmt: skip
    return tuple(
        Speaker(name=f"spk{i:02d}", gender=g, accent=a, variant=v, pitch=p, rate=r, tract=t)
        for i, (g, a, v, p, r, t) in enumerate(table)
    )


SPEAKERS = _speakers()


@dataclass(frozen=True, kw_only=True)
class Manner:
    """A speaking style, as departures from the speaker's means."""

    pitch: float = 0.0
    """Offset of the pitch in espeak-ng's units."""
    range: float = 1.0
    """Factor of the intonation range."""
    rate: float = 1.0
    tilt_db: float = 0.0
    """Spectral slope in dB per octave, around 1 kHz."""
    level_db: float = 0.0


MANNERS = {
    "neutral": Manner(),
    "happy": Manner(pitch=11, range=1.5, rate=1.07, tilt_db=0.4),
    "angry": Manner(pitch=4, range=1.3, rate=1.16, tilt_db=1.2, level_db=3),
    "sad": Manner(pitch=-7, range=0.6, rate=0.87, tilt_db=-0.8, level_db=-3),
}

# espeak-ng's IPA, of all accents, folded into CMUdict's 39 phones. A vowel with its stress mark goes first.
PHONES: dict[str, str] = {
    "p": "P", "b": "B", "t": "T", "d": "D", "k": "K", "ɡ": "G", "tʃ": "CH", "dʒ": "JH", "f": "F",
    "v": "V", "θ": "TH", "ð": "DH", "s": "S", "z": "Z", "ʃ": "SH", "ʒ": "ZH", "h": "HH", "m": "M",
    "n": "N", "ŋ": "NG", "l": "L", "ɹ": "R", "r": "R", "j": "Y", "w": "W", "ʍ": "W", "ɾ": "D",
    "əl": "AH L", "ɪ": "IH", "ᵻ": "IH", "i": "IY", "iː": "IY", "e": "IY", "ˈe": "EH", "eʲ": "IY",
    "ɛ": "EH", "æ": "AE", "a": "AE", "a:": "AE", "ɑː": "AA", "aː": "AA", "ɒ": "AA", "ɔ": "AO",
    "ɔː": "AO", "o": "AO", "ʊ": "UH", "uː": "UW", "ʉ": "UW", "ʉː": "UW", "ʌ": "AH", "ɐ": "AH",
    "ə": "AH", "ɜ": "ER", "ɜː": "ER", "ɚ": "ER", "eɪ": "EY", "eː": "EY", "aɪ": "AY", "ɔɪ": "OY",
    "oʊ": "OW", "əʊ": "OW", "oː": "OW", "aʊ": "AW", "ʌʉ": "AW", "iə": "IY AH", "aɪə": "AY AH",
    "eə": "EH AH", "ʊə": "UH AH", "ɪɹ": "IH R", "ɛɹ": "EH R", "ʊɹ": "UH R", "ʉɹ": "UH R", "ɑːɹ": "AA R",
    "ɔːɹ": "AO R", "oːɹ": "AO R", "ʌɹ": "ER", "əɹ": "ER",
}  # fmt: skip


def espeak_version() -> str:
    """Return espeak-ng's version line without its data path, e.g. "eSpeak NG text-to-speech: 1.51"."""
    return _espeak("--version").decode().split("  ")[0].strip()


def phones(text: str, accent: str) -> list[str]:
    """Return espeak-ng's phones of `text` in `accent`, without stress and word boundaries."""
    ipa = _espeak("-q", "-v", accent, "--ipa", "--sep=_", text).decode()
    symbols: list[str] = []
    for token in ipa.replace("_", " ").split():
        bare = token.replace("ˈ", "").replace("ˌ", "")
        if not bare:
            continue
        if bare not in PHONES:
            raise UserError(f"{text!r} ({accent}): phone {bare!r} is not in PHONES; add it there")
        for symbol in PHONES.get(token, PHONES[bare]).split():
            # espeak-ng writes a linking r twice: at the end of one word and before the vowel of the next.
            if not (symbol == "R" and symbols and symbols[-1] in ("R", "ER")):
                symbols.append(symbol)
    return symbols


def speak(speaker: Speaker, text: str, rng: np.random.Generator, style: str = "neutral") -> Wave:
    """Synthesize `text` in the speaker's voice, dry and trimmed, as a float wave at 16 kHz."""
    import soundfile
    import soxr

    manner = MANNERS[style]
    pitch = np.clip(speaker.pitch + manner.pitch + rng.normal(0, 4), 1, 99)
    rate = speaker.rate * manner.rate * np.exp(rng.normal(0, 0.07))
    span = 100 * manner.range * np.exp(rng.normal(0, 0.15))
    tract = speaker.tract * np.exp(rng.normal(0, 0.008))
    # Resampling by `tract` moves formants, pitch and rate alike: the rate is undone, the pitch is left so.
    settings = [
        "-v",
        f"{speaker.accent}+{speaker.variant}",
        "-p",
        f"{pitch:.0f}",
        "-s",
        f"{rate / tract:.0f}",
    ]
    ssml = f'<prosody range="{span:.0f}%">{text}</prosody>'
    wav = _espeak("-z", "-m", "-a", "50", "--stdout", *settings, ssml)  # at -a 100 some variants clip
    wave, native_rate = soundfile.read(io.BytesIO(wav), dtype="float64")
    wave = soxr.resample(wave, native_rate * tract, SAMPLE_RATE)
    return tilted(trimmed(wave), manner.tilt_db)


def trimmed(wave: Wave, below_db: float = -45.0) -> Wave:
    """Trim the ends of `wave` that stay `below_db` under its peak, keeping 10 ms on both sides."""
    loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10 ** (below_db / 20))
    margin = SAMPLE_RATE // 100
    return wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def tilted(wave: Wave, db_per_octave: float) -> Wave:
    """Apply a linear spectral slope to `wave` that keeps 1 kHz unchanged."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE), 60) / 1000)
    return np.fft.irfft(np.fft.rfft(wave) * 10 ** (db_per_octave * octaves / 20), len(wave))


def padded(wave: Wave, rng: np.random.Generator, most_seconds: float = 0.15) -> Wave:
    """Pad `wave` with 0.05 to `most_seconds` of zeros on both sides."""
    before, after = (int(rng.uniform(0.05, most_seconds) * SAMPLE_RATE) for _ in range(2))
    return np.pad(wave, (before, after))


def coloured_noise(length: int, rng: np.random.Generator) -> Wave:
    """Generate noise of unit power whose spectrum falls by 0 to 6 dB per octave."""
    noise = tilted(rng.standard_normal(length), -rng.uniform(0, 6))
    return np.asarray(noise / np.sqrt(np.mean(noise**2)))


def recorded(wave: Wave, rng: np.random.Generator, level_db: float = 0.0) -> Wave:
    """Simulate a recording of `wave`: a small room, a microphone's slope, noise at 14 to 40 dB, -30 to -18 dBFS.

    Digital silence in `wave` does not count towards its level. The peak is at most 0.9.
    """
    tail_length = int(0.3 * SAMPLE_RATE)
    reverberation_seconds = rng.uniform(0.08, 0.35)
    decay = np.exp(-6.9 * np.arange(tail_length) / (reverberation_seconds * SAMPLE_RATE))
    tail = rng.standard_normal(tail_length) * decay
    tail *= 10 ** (rng.uniform(-22, -8) / 20) / np.sqrt(np.sum(tail**2))
    size = 1 << (len(wave) + tail_length).bit_length()
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(tail, size), size)[: len(wave)]
    sound = tilted(wave + wet, rng.uniform(-2, 2))
    power = np.mean(sound[np.abs(wave) > 0] ** 2)
    sound = sound + coloured_noise(len(sound), rng) * np.sqrt(power * 10 ** (-rng.uniform(14, 40) / 10))
    sound = sound * 10 ** ((rng.uniform(-30, -18) + level_db) / 20) / np.sqrt(power)
    return np.asarray(sound * min(1.0, 0.9 / np.abs(sound).max()))


def _espeak(*arguments: str) -> bytes:
    try:
        return subprocess.run(["espeak-ng", *arguments], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise UserError("espeak-ng: not found; install it (only remaking the sample corpus needs it)") from None
