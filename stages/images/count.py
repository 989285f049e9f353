"""Counts in messages."""


def format_count(count: int, singular: str, plural: str) -> str:
    """Format a count and the text after it: `1 file is empty`, `2,000 files are empty`."""
    return f"{count:,} {singular if count == 1 else plural}"
