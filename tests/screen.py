"""What a person sees of a run, for tests to look at."""

from stages.runtime.context import Reporter


class Screen(Reporter):
    """Remembers what a person would have read, and which pictures there were."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.pictures: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def picture(self, name: str, png: bytes, step: int) -> None:
        self.pictures.append(name)
