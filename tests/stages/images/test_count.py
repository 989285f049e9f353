"""Tests of counts in messages."""

from stages.images.count import format_count


def test_counts_agree_with_their_nouns_and_verbs():
    """Only one is singular."""
    texts = [format_count(count, "file is", "files are") for count in (0, 1, 2, 2000)]
    assert texts == ["0 files are", "1 file is", "2 files are", "2,000 files are"]
