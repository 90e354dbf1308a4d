"""Comments with a topic each, for the second data set of the study: `python -m benchmarks.reddit_topics FILE`.

Reads a CSV with the columns text, created_utc and subreddit, and writes two where `treaties/studies/reddit-topics.toml`
looks for them: `runs/data/reddit.csv` of comments before a day that is the same for everybody, and `reddit-test.csv` of
later ones; each with the topic that its subreddit belongs to. Rows of other subreddits are left out.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from foedus.errors import DataError

COLUMNS = ("text", "created_utc", "subreddit")
TOPICS = {
    "tech": ("programming", "machinelearning", "compsci", "gadgets"),
    "culture": ("books", "movies", "television"),
    "play": ("gaming", "sports"),
    "world": ("news", "worldnews", "history", "weather"),
}
TOPIC_OF = {subreddit: topic for topic, members in TOPICS.items() for subreddit in members}
BORDER = datetime(2015, 4, 10, tzinfo=UTC)
FOLDER = Path("runs/data")


def with_topics(table: pa.Table) -> pa.Table:
    """The rows of known subreddits, and a column `topic`."""
    topics = pa.array([TOPIC_OF.get(name) for name in table["subreddit"].to_pylist()], pa.string())
    return table.append_column("topic", topics).filter(topics.is_valid())


def main(source: Path) -> None:
    """Writes both files, and says what is in them. Raises `DataError` where a column is missing."""
    found = csv.read_csv(source, parse_options=csv.ParseOptions(newlines_in_values=True))
    if not set(COLUMNS) <= set(found.column_names):
        came = ", ".join(found.column_names)
        raise DataError(f"the columns {', '.join(COLUMNS)}", came, "Rename them in its first line.", where=str(source))
    table = with_topics(found)
    late = pc.greater_equal(table["created_utc"], int(BORDER.timestamp()))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, rows in (("reddit.csv", pc.invert(late)), ("reddit-test.csv", late)):
        part = table.filter(rows)
        csv.write_csv(part, FOLDER / name)
        counts = part["topic"].value_counts().to_pylist()
        print(f"{FOLDER / name}: " + ", ".join(f"{each['counts']:,} of {each['values']}" for each in counts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reddit_topics", description=__doc__)
    parser.add_argument("source", type=Path, help="a CSV file, compressed or not")
    main(parser.parse_args().source)
