"""Compare every shard of a dataset with the sha256 in its meta.json: `python -m data.verify DIR`.

Opening a dataset checks its structure in milliseconds; this reads all of it.
"""

import argparse
from collections.abc import Sequence

from tqdm import tqdm

from data.command import run
from data.dataset import Dataset, open_dataset
from data.files import sha256_of
from data.meta import META, SPLITS
from data.shards import DataError


def verify(dataset: Dataset) -> int:
    """Number of files whose content is what meta.json says. DataError names those that differ."""
    entries = [entry for name in SPLITS for entry in dataset.meta["splits"][name]["files"]]
    damaged = [
        entry["name"]
        for entry in tqdm(entries, unit="file", disable=None)
        if sha256_of(dataset.dir / entry["name"]) != entry["sha256"]
    ]
    if damaged:
        raise DataError(
            f"{dataset.dir}: content differs from the sha256 in {META}: {', '.join(damaged)}; "
            "restore these files or prepare the data again"
        )
    return len(entries)


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m data.verify", description=__doc__)
    options.add_argument("dataset", help="name or folder")
    dataset = open_dataset(options.parse_args(argv).dataset)
    print(f"{dataset.dir}: {verify(dataset)} files are what {META} says")


if __name__ == "__main__":
    run(main)
