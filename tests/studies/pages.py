"""Read an HTML report."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags of a page with their attributes, the rows of all tables, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.rows = [[cell.strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """Return the first row of that name. In a page of one study it is in the leaderboard."""
        return next(row for row in self.rows if row[0].removesuffix(" (best)") == name)


def read(folder) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))
