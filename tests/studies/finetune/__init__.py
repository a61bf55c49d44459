"""Tests of the study of fine-tuning. They are skipped without the libraries of Hugging Face."""

import pytest

for library in ("transformers", "peft"):
    pytest.importorskip(library, reason=f"{library} is not installed")
