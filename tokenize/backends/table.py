"""Table of the built-in codecs, one entry each. `tokenize/registry.py` finds codecs of other packages."""

from __future__ import annotations

from codecssl.tokenize.codec import Backend


def _hub(repository: str, also: str = "") -> str:
    return f"`huggingface-cli download {repository}`, or give the folder{also} as --codec PATH"


BACKENDS = {
    "tiny_16khz": Backend(
        module="codecssl.tokenize.backends.tiny_16khz",
        summary="16 kHz, 50 Hz, 8 x 1024, 4 kbps; embedded, runs anywhere",
        weights="shipped with codecssl",
        file="*.safetensors",
    ),
    "encodec_24khz": Backend(
        module="codecssl.tokenize.backends.encodec",
        summary="24 kHz, 75 Hz, up to 32 x 1024, 0.75 kbps per codebook (Defossez et al. 2022)",
        weights=_hub("facebook/encodec_24khz", " or the .th file"),
        model_type="encodec",
        sample_rates=(24_000,),
        file="encodec_24khz*.th",
    ),
    "encodec_48khz": Backend(
        module="codecssl.tokenize.backends.encodec_48khz",
        summary="48 kHz stereo, 150 Hz in segments of 1 s, up to 16 x 1024, 1.5 kbps/codebook (Defossez et al. 2022)",
        weights=_hub("facebook/encodec_48khz", " or the .th file"),
        model_type="encodec",
        sample_rates=(48_000,),
        file="encodec_48khz*.th",
    ),
    "dac_16khz": Backend(
        module="codecssl.tokenize.backends.dac",
        summary="16 kHz, 50 Hz, up to 12 x 1024, 0.5 kbps per codebook (Kumar et al. 2023)",
        weights=_hub("descript/dac_16khz"),
        model_type="dac",
        sample_rates=(16_000,),
    ),
    "dac_24khz": Backend(
        module="codecssl.tokenize.backends.dac",
        summary="24 kHz, 75 Hz, up to 32 x 1024, 0.75 kbps per codebook (Kumar et al. 2023)",
        weights=_hub("descript/dac_24khz"),
        model_type="dac",
        sample_rates=(24_000,),
    ),
    "dac_44khz": Backend(
        module="codecssl.tokenize.backends.dac",
        summary="44.1 kHz, 86.1 Hz, up to 9 x 1024, 0.86 kbps per codebook (Kumar et al. 2023)",
        weights=_hub("descript/dac_44khz"),
        model_type="dac",
        sample_rates=(44_100,),
    ),
    "mimi": Backend(
        module="codecssl.tokenize.backends.mimi",
        summary="24 kHz, 12.5 Hz, up to 32 x 2048, 0.14 kbps/codebook, the first one semantic (Defossez et al. 2024)",
        weights=_hub("kyutai/mimi"),
        model_type="mimi",
        sample_rates=(24_000,),
    ),
    "qwen3_tts_12hz": Backend(
        module="codecssl.tokenize.backends.qwen3_tts",
        summary="24 kHz, 12.5 Hz, 16 x 2048, 2.2 kbps, Mimi's encoder; encodes only (Qwen3-TTS-Tokenizer-12Hz)",
        weights=_hub("Qwen/Qwen3-TTS-Tokenizer-12Hz"),
        model_type="qwen3_tts_tokenizer_12hz",
    ),
    "xcodec": Backend(
        module="codecssl.tokenize.backends.xcodec",
        summary="16 kHz, 50 Hz, up to 8 x 1024, 0.5 kbps per codebook, HuBERT inside (Ye et al. 2024)",
        weights=_hub("hf-audio/xcodec-hubert-librispeech"),
        model_type="xcodec",
        sample_rates=(16_000,),
    ),
    "speechtokenizer": Backend(
        module="codecssl.tokenize.backends.speechtokenizer",
        summary="16 kHz, 50 Hz, up to 8 x 1024, 0.5 kbps per codebook, the first from HuBERT (Zhang et al. 2024)",
        weights=_hub("fnlp/SpeechTokenizer", " or its SpeechTokenizer.pt"),
        file="SpeechTokenizer*.pt",
        contains="SpeechTokenizer*.pt",
    ),
    "wavtokenizer": Backend(
        module="codecssl.tokenize.backends.wavtokenizer",
        summary="24 kHz, 75 or 40 Hz, 1 x 4096, 0.9 or 0.48 kbps (Ji et al. 2024)",
        weights=_hub("novateur/WavTokenizer-large-speech-75token", " or one of the .ckpt files of novateur"),
        file="*avtokenizer*.ckpt",
        contains="*avtokenizer*.ckpt",
    ),
    "hificodec_16khz": Backend(
        module="codecssl.tokenize.backends.hificodec",
        summary="16 kHz, 50 Hz, up to 4 x 1024 in 2 groups of 2 layers, 0.5 kbps per codebook (Yang et al. 2023)",
        weights=_hub("Dongchao/AcademiCodec HiFi-Codec-16k-320d", " or the file"),
        file="HiFi-Codec-16k*",
        contains="HiFi-Codec-16k*",
    ),
    "hificodec_24khz": Backend(
        module="codecssl.tokenize.backends.hificodec",
        summary="24 kHz, 75 Hz, up to 4 x 1024 in 2 groups of 2 layers, 0.75 kbps per codebook (Yang et al. 2023)",
        weights=_hub("Dongchao/AcademiCodec HiFi-Codec-24k-320d", " or the file"),
        file="HiFi-Codec-24k*",
        contains="HiFi-Codec-24k*",
    ),
    "xcodec2": Backend(
        module="codecssl.tokenize.backends.fsq.xcodec2",
        summary="16 kHz, 50 Hz, 1 x 65536, 0.8 kbps, w2v-BERT 2.0 inside (Ye et al. 2025)",
        weights=_hub("HKUSTAudio/xcodec2"),
    ),
    "neucodec": Backend(
        module="codecssl.tokenize.backends.fsq.xcodec2",
        summary="16 kHz, 50 Hz, 1 x 65536, 0.8 kbps, X-codec2's layers (Neuphonic 2025)",
        weights=_hub("neuphonic/neucodec", " or its pytorch_model.bin"),
    ),
    "s3tokenizer_v2": Backend(
        module="codecssl.tokenize.backends.fsq.s3tokenizer",
        summary="16 kHz, 25 Hz, 1 x 6561, 0.33 kbps, from speech recognition; encodes only (CosyVoice 2, 2024)",
        weights="`pip install s3tokenizer` elsewhere and torch.save the state_dict() of s3tokenizer.load_model("
        "'speech_tokenizer_v2_25hz') to speech_tokenizer_v2.pt; give the file as --codec PATH",
        file="speech_tokenizer_v2*.pt",
        contains="speech_tokenizer_v2*.pt",
    ),
    "focalcodec": Backend(
        module="codecssl.tokenize.backends.fsq.focalcodec",
        summary="16 kHz, 50, 25 or 12.5 Hz, 1 x 8192, 0.65 to 0.16 kbps, WavLM inside (Della Libera et al. 2025)",
        weights=_hub("lucadellalib/focalcodec_50hz"),
    ),
    "dualcodec_12hz": Backend(
        module="codecssl.tokenize.backends.dualcodec",
        summary="24 kHz, 12.5 Hz, 16384 + up to 7 x 4096, 1.2 kbps, w2v-BERT 2.0 inside (Li et al. 2025)",
        weights=_hub("amphion/dualcodec", " with a folder w2v-bert-2.0 in it") + "; also facebook/w2v-bert-2.0",
        file="dualcodec_12hz*.safetensors",
        contains="dualcodec_12hz*.safetensors",
    ),
    "dualcodec_25hz": Backend(
        module="codecssl.tokenize.backends.dualcodec",
        summary="24 kHz, 25 Hz, 16384 + up to 11 x 1024, 3.1 kbps, w2v-BERT 2.0 inside (Li et al. 2025)",
        weights=_hub("amphion/dualcodec", " with a folder w2v-bert-2.0 in it") + "; also facebook/w2v-bert-2.0",
        file="dualcodec_25hz*.safetensors",
        contains="dualcodec_25hz*.safetensors",
    ),
    "moss_audio": Backend(
        module="codecssl.tokenize.backends.moss.codec",
        summary="24 kHz, 12.5 Hz, up to 32 x 1024, 0.125 kbps per codebook, 1.6 billion parameters (OpenMOSS 2026)",
        weights=_hub("OpenMOSS-Team/MOSS-Audio-Tokenizer"),
        model_type="speech_tokenizer",
        sample_rates=(24_000,),
    ),
    "snac_24khz": Backend(
        module="codecssl.tokenize.backends.snac",
        summary="24 kHz, 3 x 4096 at 11.7, 23.4 and 46.9 Hz, 0.98 kbps (Siuzdak et al. 2024; needs pip install snac)",
        weights=_hub("hubertsiuzdak/snac_24khz"),
        model_type="snac",
        sample_rates=(24_000,),
    ),
    "semanticodec": Backend(
        module="codecssl.tokenize.backends.semanticodec.codec",
        summary="16 kHz, 6.25 or 3.1 columns/s of 8 or 4 x (centroid + 8192), encodes only (Liu et al. 2024)",
        weights="`huggingface-cli download haoheliu/SemantiCodec`, or give a folder with one encoder.ckpt and one "
        "codebook_*.npy of it as --codec semanticodec@PATH",
        contains="semanticodec_tokenrate_*/encoder.ckpt",
    ),
    "lyra_v2": Backend(
        module="codecssl.tokenize.backends.lyra",
        summary="16 kHz, 50 Hz, up to 46 x 16, 0.2 kbps per codebook (SoundStream as in Lyra v2)",
        weights="give the folder with Lyra's model_coeffs/*.tflite as --codec PATH (needs pip install ai-edge-litert)",
        contains="soundstream_encoder.tflite",
    ),
}
