"""Compare every shard of a dataset with the sha256 in its meta.json: `python -m data.verify DIR`.

Opening a dataset checks only its structure; this command reads all of its content.
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
    """Check the sha256 of every shard and return the number of shards.

    Raises DataError naming the files that differ from meta.json.
    """
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
    print(f"{dataset.dir}: {verify(dataset)} files agree with {META}")


if __name__ == "__main__":
    run(main)
