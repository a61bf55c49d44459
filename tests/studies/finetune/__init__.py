"""Test the study of fine-tuning. The tests are skipped without the libraries of Hugging Face."""

import pytest

for library in ("transformers", "peft"):
    pytest.importorskip(library, reason=f"{library} is not installed")
