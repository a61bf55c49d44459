"""Reads a report back, for the tests of what it says."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, the rows of all tables as text, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)

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
        """The first row that starts with this name: the leaderboard's, in a page of one study."""
        found = (row for row in self.rows if row[0].removesuffix(" (best)") == name)
        return next(found)


def read(folder) -> Page:
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    page.rows = [[cell.strip() for cell in row] for row in page.rows]
    return page
