"""Tables: by rich on a terminal, and in plain columns in a pipe."""

from collections.abc import Sequence


def write_table(cells: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table, its head first: by rich on a terminal, else in columns of at least three spaces between, for cut
    and awk."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        print(*[title] if title else [], end="\n" if title else "")
        for row in cells:
            print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in cells[0]:
        table.add_column(Text(name), overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # a name in brackets is no markup
    console.print(table)
