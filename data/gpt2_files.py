"""Provide the files of GPT-2's tokenizer in tiktoken's cache."""

import hashlib
import os
import tempfile
from pathlib import Path

from data.files import fetch, sha256_of

# URL -> sha256 of the file. tiktoken stores each file under the sha1 of its URL.
GPT2_FILES = {
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
}


def ensure_gpt2_files() -> None:
    """Download missing or damaged files to tiktoken's cache.

    tiktoken itself would wait without limit for a network that does not answer.
    """
    folder = _tiktoken_cache()
    paths = {url: folder / hashlib.sha1(url.encode()).hexdigest() for url in GPT2_FILES}
    try:
        for url, path in paths.items():
            if not path.exists() or sha256_of(path) != GPT2_FILES[url]:
                fetch(url, path, GPT2_FILES[url])
    except OSError as error:
        listed = "\n".join(f"  {path}  =  {url}" for url, path in paths.items())
        raise ValueError(
            f"tokenizer 'gpt2' needs two files that are absent or damaged, and their download "
            f"failed ({error}).\nPut them here (TIKTOKEN_CACHE_DIR names the folder):\n{listed}\n"
            "or use --tokenizer=bpe, which needs no download."
        ) from None


def _tiktoken_cache() -> Path:
    """Return the folder in which tiktoken keeps its files."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            if not os.environ[variable]:
                raise ValueError(f"{variable} is empty: set it to a folder, or unset it")
            return Path(os.environ[variable])
    return Path(tempfile.gettempdir(), "data-gym-cache")
