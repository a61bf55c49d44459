"""The Python blocks of docs/integrations.md."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[3] / "docs" / "integrations.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def block_of(section: str) -> str:
    """Return the only block of a section, with the imports of the checkout."""
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert block.count("\n") <= 14  # 13 lines and an empty one
    return block.replace("from dopr", "from optim")
