"""Tables of figures in Markdown."""


def markdown(heads, rows):
    """A table; columns of figures go to the right."""
    figures = [all(cell[:1] in "0123456789+−–[" for cell in column) for column in zip(*rows, strict=True)]
    lines = [heads, ["---:" if right else "---" for right in figures], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value, form=".3f"):
    """A figure with a real minus sign; a dash for None."""
    return "–" if value is None else format(value, form).replace("-", "−")


def between(pair, form=".3f"):
    """An interval (low, high)."""
    return "–" if pair is None else f"[{number(pair[0], form)}, {number(pair[1], form)}]"


def code(text):
    """`text` as code in a cell of a table."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"
